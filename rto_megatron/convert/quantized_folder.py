"""Reads an exported FP8 or NVFP4 folder back and holds every tensor against the folder that it was made from.

Nothing here uses the library that wrote it: scales are computed again from the source's weights.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rto_megatron.errors import ConversionError, refuse_if
from rto_megatron.storage.hf_folder import HfFolder
from rto_megatron.storage.weight_files import unreadable

FP8_MAX = 448.0  # of float8_e4m3fn
FP4_MAX = 6.0  # of e2m1
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_BLOCK = 16
_SCALES = ("weight_scale", "weight_scale_2", "input_scale")
# Matrices that stay as they are: embeddings, heads, and routers, whose choices hang on small differences.
_KEPT = re.compile(r"(.*\.)?(lm_head|score|embed_tokens|gate|shared_expert_gate)\.weight")
# transformers holds gate and up of an expert as one matrix, and one matrix has one scale.
_FUSED = re.compile(r"(.*\.experts\.\d+\.)(gate_proj|up_proj|w1|w3)\.weight")
_PARTNER = {"gate_proj": "up_proj", "up_proj": "gate_proj", "w1": "w3", "w3": "w1"}
_SCALE_TOLERANCE = 1e-6  # relative: one division in float32


@dataclass(frozen=True)
class QuantizedMatrices:
    """What became of the matrices of a model.

    Example:
        QuantizedMatrices(num_quantized=224, kept=("lm_head.weight",))
    """

    num_quantized: int
    kept: tuple[str, ...]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of an exported folder, over the pages of its files.

    Raises:
        UserError: a file is damaged.
    """
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from error
    return tensors


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor holds FP8 numbers or packed FP4 numbers."""
    return tensor.dtype in (torch.float8_e4m3fn, torch.uint8)


def dequantize(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """The weight `name` in float32: FP8 numbers times the scale of the matrix, or FP4 numbers times block scales."""
    weight, stem = tensors[name], name.removesuffix("weight")
    scale = tensors[f"{stem}weight_scale"].float()
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * scale
    values = torch.tensor([*_FP4_VALUES, *(-value for value in _FP4_VALUES)])
    # Two numbers a byte, the earlier one in the low half.
    numbers = torch.stack([values[(weight & 15).long()], values[(weight >> 4).long()]], -1).flatten(-2)
    blocks: Tensor = numbers.unflatten(-1, (-1, _FP4_BLOCK))
    return (blocks * (scale * tensors[f"{stem}weight_scale_2"]).unsqueeze(-1)).flatten(-2)


def dequantized(tensors: dict[str, Tensor], source: HfFolder) -> dict[str, Tensor]:
    """A state dict that transformers loads, in the dtypes of the source and without scales."""
    return {
        name: dequantize(name, tensors).to(source.tensors[name].dtype) if is_quantized(tensor) else tensor
        for name, tensor in tensors.items()
        if not name.endswith(_SCALES)
    }


def prove(source: HfFolder, tensors: dict[str, Tensor], input_scales: Collection[float]) -> QuantizedMatrices:
    """Checks names, scales and values of every tensor.

    Args:
        input_scales: those that calibration measured; the folder must have exactly these.

    Raises:
        UserError: names all that is wrong.
    """
    problems = [*_name_problems(source, tensors), *_input_scale_problems(tensors, input_scales)]
    if not problems:
        problems = [problem for name in source.tensors for problem in _value_problems(name, source, tensors)]
    refuse_if(
        problems, f"the quantised export is not that of {source.path}; do not serve it", ConversionError
    )
    quantized = {name for name, tensor in tensors.items() if is_quantized(tensor)}
    kept = [
        name for name, stored in source.tensors.items() if len(stored.shape) == 2 and name not in quantized
    ]
    return QuantizedMatrices(len(quantized), tuple(sorted(kept)))


def _name_problems(source: HfFolder, tensors: dict[str, Tensor]) -> Iterator[str]:
    expected = set(source.tensors)
    for name, stored in source.tensors.items():
        if name not in tensors:
            yield f"{name} is missing"
            continue
        if len(stored.shape) != 2 or _KEPT.fullmatch(name):
            if tensors[name].dtype != stored.dtype:
                yield f"{name} is {tensors[name].dtype}, expected it left alone in {stored.dtype}"
            continue
        if not is_quantized(tensors[name]):
            yield f"{name} is {tensors[name].dtype}, expected it quantised"
            continue
        stem = name.removesuffix("weight")
        kinds = _SCALES if tensors[name].dtype == torch.uint8 else ("weight_scale", "input_scale")
        scales = {f"{stem}{kind}" for kind in kinds}
        expected |= scales
        yield from (f"{scale} is missing" for scale in sorted(scales - tensors.keys()))
    yield from (f"{name} is left over" for name in sorted(tensors.keys() - expected))


def _input_scale_problems(tensors: dict[str, Tensor], measured: Collection[float]) -> Iterator[str]:
    known = torch.tensor(sorted(measured), dtype=torch.float64)
    found = {name: float(tensor) for name, tensor in tensors.items() if name.endswith(".input_scale")}
    for name, scale in found.items():
        if not _is_among(scale, known):
            yield f"{name} is {scale:g}, which calibration did not measure"
    stored = torch.tensor(list(found.values()), dtype=torch.float64)
    yield from (f"the measured input scale {s:g} is nowhere" for s in measured if not _is_among(s, stored))


def _is_among(scale: float, known: Tensor) -> bool:
    return scale > 0 and bool(((known - scale).abs() <= _SCALE_TOLERANCE * scale).any())


def _value_problems(name: str, source: HfFolder, tensors: dict[str, Tensor]) -> Iterator[str]:
    weight = source.tensor(name).float()
    if not is_quantized(tensors[name]):
        if not torch.equal(weight, tensors[name].float()):
            yield f"{name} changed, expected it left alone"
        return
    stem = name.removesuffix("weight")
    is_fp8 = tensors[name].dtype == torch.float8_e4m3fn
    scale = float(tensors[f"{stem}weight_scale" if is_fp8 else f"{stem}weight_scale_2"])
    divisor = FP8_MAX if is_fp8 else FP8_MAX * FP4_MAX
    expected = _largest(name, weight, source) / divisor
    if not _is_among(scale, expected):
        yield f"the scale of {name} is {scale:g}, expected its largest weight / {divisor:g} = {float(expected[0]):g}"
        return
    error = (dequantize(name, tensors) - weight).abs()
    bound = _fp8_bound(weight, scale) if is_fp8 else _fp4_bound(weight, scale)
    if not bool((error <= bound).all()):
        yield f"{name} is off by {float(error.max()):g}, more than rounding explains"


def _largest(name: str, weight: Tensor, source: HfFolder) -> Tensor:
    """The largest absolute weight of the matrix, and of the matrix with its fused partner where it has one."""
    own = float(weight.abs().max())
    fused = _FUSED.fullmatch(name)
    if fused is None:
        return torch.tensor([own], dtype=torch.float64)
    partner = source.tensor(f"{fused[1]}{_PARTNER[fused[2]]}.weight")
    return torch.tensor([own, max(own, float(partner.abs().max()))], dtype=torch.float64)


def _fp8_bound(weight: Tensor, scale: float) -> Tensor:
    """The distance to the nearest FP8 number, and the rounding of the quotient before it.

    ModelOpt divides by the scale in the dtype of the model: of bf16 weights, a quotient that bf16 rounds to the middle
    between two FP8 numbers takes the even one (3 % of all weights), which is about as near.
    """
    nearest = (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    return (nearest - weight).abs() + weight.abs() * 2**-7


def _fp4_bound(weight: Tensor, scale: float) -> Tensor:
    """Half the widest step of e2m1 (4 to 6) of a block's largest weight, and the rounding of its scale to e4m3."""
    largest: Tensor = weight.unflatten(-1, (-1, _FP4_BLOCK)).abs().amax(-1, keepdim=True)
    block_bound = largest * (1 / 6 + 2**-4) * 1.01 + scale * FP4_MAX * 2**-10
    return block_bound.expand(*block_bound.shape[:-1], _FP4_BLOCK).flatten(-2)
