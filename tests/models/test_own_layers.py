"""A family may bring an activation, windows of attention, a scale of embeddings and modules of its own."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
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


def _read_granite(config: HfConfig, shape: ModelShape) -> ModelShape:
    return replace(shape, embedding_scale=float(config.values["embedding_multiplier"]))


def _read_windows(config: HfConfig, shape: ModelShape) -> ModelShape:
    kinds = config.values["layer_types"]
    windowed = tuple(index for index, kind in enumerate(kinds) if kind == "sliding_attention")
    return replace(shape, has_qkv_bias=True, window=config.values["sliding_window"], windowed_layers=windowed)


GRANITE = replace(
    llama.FAMILY,
    architectures={False: "GraniteForCausalLM"},
    read=_read_granite,
    activations={"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"},
    layer_spec=_own_spec,
)
CASES: dict[str, tuple[Family, dict[str, object]]] = {
    "gelu": (GRANITE, {"model_type": "granite", "hidden_act": "gelu", "embedding_multiplier": 1.0}),
    "scaled": (
        GRANITE,
        {"model_type": "granite", "hidden_act": "gelu_pytorch_tanh", "embedding_multiplier": 12.0},
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
    # Where keys are gathered, a window is of the whole row.
    [*product(CASES, ("one", "tp2", "pp2")), ("windows", "cp2_gather")],
)
def test_what_a_family_brings_gives_hugging_faces_numbers(
    case: str, layout: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = CASES[case]
    torch.manual_seed(5)
    plain = {"attention_multiplier": 0.25, "residual_multiplier": 1.0, "logits_scaling": 1.0}  # heads of 16
    config = AutoConfig.for_model(**{**COMMON, **(plain if family is GRANITE else {}), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(FAMILIES, str(changes["model_type"]), family)
    theirs = hugging_face_outputs(model, SEQUENCES, False)
    assert max(len(ids) for ids, _ in SEQUENCES) > WINDOW + 2
    for ours in run_ranks(LAYOUTS[layout][0], _outputs, layout, tmp_path, packed):
        assert _largest_difference(ours, theirs) < 1e-5
