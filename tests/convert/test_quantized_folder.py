"""What stands in a quantised folder, calculated by hand, and damage that is noticed."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file, save_file
from tiny_models import write_llama

from rto_megatron.convert import quantized_folder
from rto_megatron.convert.quantize import Choices, quantize_checkpoint
from rto_megatron.errors import ConversionError
from rto_megatron.storage.hf_folder import HfFolder

MATRIX = "model.layers.1.self_attn.k_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float32 source and what was made of it."""
    root = tmp_path_factory.mktemp("llama")
    write_llama(root / "source")
    choices = Choices("fp8", None, num_prompts=8, max_length=32, seed=3)
    quantize_checkpoint(root / "source", root / "target", choices)
    return root / "source", root / "target"


def _e4m3_values() -> list[float]:
    """All non-negative FP8 numbers, from the definition: 4 bits of exponent (bias 7), 3 of mantissa; 0x7f is NaN."""
    values = []
    for code in range(0x7F):
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return values


def test_scales_and_weights_are_those_of_a_calculation_by_hand(
    folders: tuple[Path, Path],
) -> None:
    source, target = folders
    weight = load_file(source / "model.safetensors")[f"{MATRIX}.weight"]
    written = quantized_folder.read_tensors(target)
    scale = float(written[f"{MATRIX}.weight_scale"])
    assert scale == pytest.approx(max(abs(w) for w in weight.flatten().tolist()) / 448.0, rel=1e-6)
    numbers = _e4m3_values()
    assert max(numbers) == 448.0
    for ours, stored in zip(
        weight[:4].flatten().tolist(), written[f"{MATRIX}.weight"][:4].flatten(), strict=True
    ):
        distance = abs(abs(float(stored)) * scale - abs(ours))
        assert distance <= min(abs(number * scale - abs(ours)) for number in numbers) + 1e-7
        assert float(stored) == 0 or math.copysign(1, ours) == math.copysign(1, float(stored))


def _scaled(key: str, factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key] * factor

    return damage


def _flipped(tensors: dict[str, torch.Tensor]) -> None:
    rows = tensors[f"{MATRIX}.weight"].view(torch.uint8)
    rows[0, 0] ^= 0x80  # the sign


def _unquantised(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MATRIX}.weight"] = tensors[f"{MATRIX}.weight"].float()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_scaled(f"{MATRIX}.weight_scale", 1.001), f"the scale of {MATRIX}.weight is"),
        (_scaled(f"{MATRIX}.input_scale", 1.001), f"{MATRIX}.input_scale is .*did not measure"),
        (lambda t: t.pop(f"{MATRIX}.weight_scale"), f"{MATRIX}.weight_scale is missing"),
        (lambda t: t.pop(f"{MATRIX}.weight"), f"{MATRIX}.weight is missing"),
        (_flipped, f"{MATRIX}.weight is off by"),
        (_unquantised, f"{MATRIX}.weight is torch.float32, expected it quantised"),
        (_scaled("lm_head.weight", 1.001), "lm_head.weight changed"),
        (lambda t: t.update(extra=torch.ones(1)), "extra is left over"),
    ],
)
def test_a_damaged_export_is_noticed(
    folders: tuple[Path, Path],
    tmp_path: Path,
    damage: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    source, target = folders
    tensors = load_file(target / "model.safetensors")
    scales = {float(tensor) for name, tensor in tensors.items() if name.endswith("input_scale")}
    quantized_folder.prove(HfFolder(source), tensors, scales)
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=message):
        quantized_folder.prove(HfFolder(source), quantized_folder.read_tensors(tmp_path), scales)


def test_fp4_numbers_are_unpacked_as_the_library_that_packs_them_does() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    packed, scale, scale_2 = NVFP4QTensor.quantize(weight, 16)
    tensors = {"w.weight": packed._quantized_data, "w.weight_scale": scale, "w.weight_scale_2": scale_2}
    want = packed.dequantize(dtype=torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    assert torch.equal(quantized_folder.dequantize("w.weight", tensors), want)
