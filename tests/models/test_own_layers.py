"""A family may bring an activation, windows of attention and modules of its own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.layouts import LAYOUTS, frozen, topology
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from ranks import run_ranks
from tiny_families import COMMON, hugging_face_outputs
from tiny_models import SEQUENCES
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rto_megatron.data.packing import token_batch
from rto_megatron.models.families import FAMILIES, llama, qwen2
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.layer_specs import layer_spec
from rto_megatron.models.norms import RMSNorm
from rto_megatron.models.shape import ModelShape

WINDOW = 3


class TorchNorm(torch.nn.RMSNorm):
    """torch's, in the place of this package's."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)


def _own_spec(shape: ModelShape, config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    spec = layer_spec(shape, config, num_experts)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = TorchNorm
    return spec


def _read_windows(config: HfConfig, shape: ModelShape) -> ModelShape:
    kinds = config.values["layer_types"]
    windowed = tuple(index for index, kind in enumerate(kinds) if kind == "sliding_attention")
    return replace(shape, has_qkv_bias=True, window=config.values["sliding_window"], windowed_layers=windowed)


CASES: dict[str, tuple[Family, dict[str, object]]] = {
    "gelu": (
        replace(llama.FAMILY, activations={"silu": "silu", "gelu": "gelu"}, layer_spec=_own_spec),
        {"model_type": "llama", "hidden_act": "gelu"},
    ),
    "windows": (
        replace(qwen2.FAMILY, read=_read_windows),
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
}


def _outputs(layout: str, folder: Path, packed: bool) -> list[Tensor]:
    place = topology(layout)
    model = frozen(place, folder, False)
    norms = {type(layer.input_layernorm) for layer in model.module.last.decoder.layers}
    assert norms == {RMSNorm if FAMILIES[model.shape.family].layer_spec is None else TorchNorm}
    batch = token_batch(
        [(ids, 1) for ids, _ in SEQUENCES], packed, place.row_multiple, place.device.torch_device
    )
    (values_T,) = model.token_outputs([batch])
    starts = batch.cu_seqlens[: len(SEQUENCES)]
    return [
        values_T[start : start + len(ids) - 1].clone()
        for start, (ids, _) in zip(starts, SEQUENCES, strict=True)
    ]


def _largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("case", "layout"),
    [("gelu", "one"), ("gelu", "tp2"), ("gelu", "pp2"), ("windows", "one")],
)
def test_what_a_family_brings_gives_hugging_faces_numbers(
    case: str, layout: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = CASES[case]
    torch.manual_seed(5)
    config = AutoConfig.for_model(**{**COMMON, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(FAMILIES, str(changes["model_type"]), family)
    theirs = hugging_face_outputs(model, SEQUENCES, False)
    assert max(len(ids) for ids, _ in SEQUENCES) > WINDOW + 2
    for ours in run_ranks(LAYOUTS[layout][0], _outputs, layout, tmp_path, packed):
        assert _largest_difference(ours, theirs) < 1e-5
