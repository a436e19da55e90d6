"""Parameters, checkpoint entries and pieces of TransformerEngine's layers are those of torch's, family by family."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS
from fused.pairs import frozen_pair
from ranks import run_ranks
from tiny_families import VARIANTS, write_family

from rto_megatron.engine.checkpoint import _model_shards
from rto_megatron.engine.megatron import Model
from rto_megatron.engine.weights import local_parameters, stage_hf_tensors, stage_pieces
from rto_megatron.models.families import FAMILIES
from rto_megatron.models.layout_checks import own_layer_parts
from rto_megatron.models.modules import ScalarHead

# What Megatron reads of a parameter, and what it takes it for where nothing says so.
_TAGS = {"sequence_parallel": False, "tensor_model_parallel": False, "partition_dim": -1, "allreduce": True}
_DENSE = ("llama", "llama3_tied", "qwen2", "qwen3")
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe_mixed")


def _names() -> list[str]:
    runs = {name for name, family in FAMILIES.items() if family.not_run is None}
    return [name for name, changes in VARIANTS.items() if changes["model_type"] in runs]


_CASES = [
    *((name, "one") for name in _names()),
    *((name, layout) for name in _DENSE for layout in ("tp2_sp", "pp2")),
    *((name, layout) for name in _MIXTURES for layout in ("tp2_sp", "ep2", "ep2_tp2_etp2")),
    ("llama", "tp2"),
]


def _parameters(model: Model) -> dict[str, object]:
    """Shape, type, and how it is cut."""
    return {
        name: (tuple(one.shape), one.dtype, [getattr(one, *tag) for tag in _TAGS.items()])
        for name, one in local_parameters(model.module).items()
    }


def _entries(shards: Mapping[str, object], name: str = "") -> dict[object, object]:
    """Key and offset -> shape and which copy is written, of every tensor; of other objects the key alone."""
    found: dict[object, object] = {}
    for entry in _leaves(shards):
        if type(entry).__name__ == "ShardedTensor":
            found[entry.key, entry.global_offset] = (entry.global_shape, entry.local_shape, entry.replica_id)
        else:
            found[entry.key, None] = type(entry).__name__
    return found


def _leaves(value):
    if isinstance(value, Mapping):
        for one in value.values():
            yield from _leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one)
    elif type(value).__name__ == "ShardedTensorFactory":
        yield from _leaves(value.build())
    elif type(value).__name__.startswith("Sharded"):
        yield value


def _compare(folder: Path, layout: str) -> None:
    fused, plain = frozen_pair(layout, folder)
    kinds = {type(module).__name__ for module in plain.module.modules()}
    own = {"FamilyLayer", "FamilyAttention", "ShiftedRMSNorm"} & kinds
    assert not own or own_layer_parts(plain.shape), "no layers of TransformerEngine's can stand for these"
    assert _parameters(fused) == _parameters(plain)
    assert _entries(_model_shards(fused)) == _entries(_model_shards(plain))
    pieces = [dict(stage_pieces(one.module, one.shape, False, one.topology)) for one in (fused, plain)]
    tensors = [dict(stage_hf_tensors(one.module, one.shape, False, one.topology)) for one in (fused, plain)]
    for got, want in (pieces, tensors):
        assert [*got] == [*want] and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(("name", "layout"), _CASES)
def test_names_shapes_tags_entries_and_pieces_are_those_of_torchs_layers(
    name: str, layout: str, tmp_path: Path
) -> None:
    write_family(tmp_path, name)
    run_ranks(LAYOUTS[layout][0], _compare, tmp_path, layout)


def _heads(folder: Path) -> None:
    for model in frozen_pair("one", folder, is_scalar=True):
        assert isinstance(model.module.last.output_layer, ScalarHead)


def test_a_scalar_head_is_the_same_module(tmp_path: Path) -> None:
    write_family(tmp_path, "qwen3", is_scalar=True)
    run_ranks(1, _heads, tmp_path)
