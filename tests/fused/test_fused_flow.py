"""Outputs and gradients through TransformerEngine's layers, with torch in the place of its kernels, are torch's.

What is proved is the way of the data: which module gets what, over which ranks, and who adds up what. In float64 little
is lost but in the norms, which are taken in float32.
"""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS
from fused import standin
from fused.pairs import apart, frozen_pair, places
from ranks import run_ranks
from tiny_families import write_family
from tiny_models import SEQUENCES
from torch import Tensor
from torch.nn import functional

from rto_megatron.data.packing import token_batch
from rto_megatron.engine.weights import load_hf_tensors, local_parameters
from rto_megatron.models.build import build_chunks, forward, transformer_config
from rto_megatron.models.config_files import read_shape
from rto_megatron.storage.hf_model import HfModel

TEXTS = [(ids, 1) for ids, _ in SEQUENCES]
_BF16 = 2**-6


def _looped(rows: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """torch's grouped product, which is not for float64."""
    pieces = pairwise([0, *offs.tolist()])
    return torch.cat([rows[start:end] @ one for (start, end), one in zip(pieces, weights, strict=True)])


def _flow(layout: str, folder: Path, is_packed: bool, recompute: bool) -> tuple[dict[str, float], set[str]]:
    """How far states and gradients are apart, and what TransformerEngine's attention was told."""
    shape, read, found = read_shape(folder), HfModel(folder, False).read, []
    functional.grouped_mm = _looped
    standin.CALLS.clear()
    for place in places(layout):
        config = transformer_config(shape, place, torch.float64, recompute)
        model = build_chunks(shape, config, place, False)
        load_hf_tensors(model, shape, False, place, read)
        states = forward(
            model.last, token_batch(TEXTS, is_packed, place.row_multiple, torch.device("cpu")), place
        )
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(states.shape, generator=generator, dtype=torch.float64)
        (states * weight).sum().backward()
        named = local_parameters(model).items()
        gradients = {name: one.grad for name, one in named if one.grad is not None}
        found.append({"states": states.detach(), **gradients})
    got, want = found
    assert got.keys() == want.keys()
    return {name: apart(got[name], want[name]) for name in want}, {
        c for c in standin.CALLS if "Attention" in c
    }


@pytest.mark.parametrize(
    ("name", "layout", "is_packed", "recompute"),
    [
        ("llama", "one", True, False),
        ("llama", "one", False, False),
        ("mistral", "one", True, True),
        ("qwen2", "tp2", True, False),
        ("llama3_tied", "tp2_sp", True, True),
        ("qwen3", "tp2_sp", False, False),
        ("qwen3", "cp2", True, False),
        ("llama", "cp2_gather", True, True),
        ("mixtral", "one", True, True),
        ("qwen2_moe", "tp2_sp", True, False),
        ("qwen3_moe_mixed", "ep2", True, True),
        ("qwen2_moe", "ep2_tp2_etp2", True, False),
    ],
)
def test_states_and_gradients_are_those_of_torchs_layers(
    name: str, layout: str, is_packed: bool, recompute: bool, tmp_path: Path
) -> None:
    write_family(tmp_path, name)
    told = {"DotProductAttention thd padding_causal" if is_packed else "DotProductAttention None causal"}
    for differences, calls in run_ranks(LAYOUTS[layout][0], _flow, layout, tmp_path, is_packed, recompute):
        assert calls == (set() if layout.startswith("cp") else told)  # over cut rows it is this package's
        assert {one: value for one, value in differences.items() if value > 1e-5} == {}


def _outputs(layout: str, folder: Path) -> float:
    models = frozen_pair(layout, folder)
    place = models[0].topology
    batch = token_batch(TEXTS, True, place.row_multiple, torch.device("cpu"))
    (got,), (want,) = (model.token_outputs([batch]) for model in models)
    return apart(got, want)


@pytest.mark.parametrize(("name", "layout"), [("llama3_tied", "pp2"), ("qwen3_moe_mixed", "ep2_pp2")])
def test_log_probs_over_pipeline_stages_are_those_of_torchs_layers(
    name: str, layout: str, tmp_path: Path
) -> None:
    write_family(tmp_path, name)
    assert max(run_ranks(LAYOUTS[layout][0], _outputs, layout, tmp_path)) < _BF16
