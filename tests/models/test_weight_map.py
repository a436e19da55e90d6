"""Layouts cut and merge as the definition says, and undo each other, at every tensor size."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from models.shapes import SHAPE
from torch import Tensor

from rto_megatron.models.parameters import parameter_map
from rto_megatron.models.weight_map import (
    GateUpRows,
    Joined,
    MappedParameter,
    QkvRows,
    Replicated,
    ShardLayout,
    Split,
    VocabRows,
    merge,
    padded_vocab,
)

HEADS, GROUPS, DIM, HIDDEN = 8, 4, 2, 6
NAMED: dict[str, tuple[ShardLayout, list[tuple[int, ...]]]] = {
    "replicated": (Replicated(), [(5,)]),
    "columns": (Split(0), [(8, 6)]),
    "rows": (Split(1), [(6, 8)]),
    "vocabulary": (VocabRows(13), [(13, 6)]),
    "gate and up": (GateUpRows(), [(8, 6), (8, 6)]),
    "qkv": (
        QkvRows(HEADS, GROUPS, DIM),
        [(HEADS * DIM, HIDDEN), (GROUPS * DIM, HIDDEN), (GROUPS * DIM, HIDDEN)],
    ),
    "gate and up in one": (Joined(GateUpRows(), (8, 8)), [(16, 6)]),
    "qkv in one": (
        Joined(QkvRows(HEADS, GROUPS, DIM), (HEADS * DIM, GROUPS * DIM, GROUPS * DIM)),
        [((HEADS + 2 * GROUPS) * DIM, HIDDEN)],
    ),
}


def _random(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMED)
def test_merging_the_shards_gives_the_tensors_back(name: str, size: int) -> None:
    layout, shapes = NAMED[name]
    tensors = _random(shapes)
    shards = [layout.shard(tensors, rank, size) for rank in range(size)]
    assert len({shard.shape for shard in shards}) == 1
    merged = merge(layout, shards)
    assert len(merged) == len(tensors)
    assert all(torch.equal(got, want) for got, want in zip(merged, tensors, strict=True))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMED)
def test_the_runs_of_all_ranks_are_the_tensors(name: str, size: int) -> None:
    layout, shapes = NAMED[name]
    tensors, names = _random(shapes), tuple(map(str, range(len(shapes))))
    parameter, dim = MappedParameter("whole", names, tuple(shapes), layout, None), layout.dim or 0
    indices: list[list[int]] = [[] for _ in shapes]
    for rank in range(1 if layout.dim is None else size):
        pieces = layout.pieces(layout.shard(tensors, rank, size), rank, size)
        for run, piece in zip(parameter.runs(rank, size), pieces, strict=True):
            assert torch.equal(piece, tensors[run.tensor].narrow(dim, run.start, run.length))
            indices[run.tensor] += range(run.start, run.start + run.length)
    assert [sorted(found) for found in indices] == [list(range(shape[dim])) for shape in shapes]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_qkv_rows_are_groups_of_query_heads_key_and_value(size: int) -> None:
    q, k, v = _random(NAMED["qkv"][1])
    rows = []
    per_group = HEADS // GROUPS
    for group in range(GROUPS):
        for head in range(group * per_group, (group + 1) * per_group):
            rows += [q[head * DIM + i] for i in range(DIM)]
        rows += [k[group * DIM + i] for i in range(DIM)]
        rows += [v[group * DIM + i] for i in range(DIM)]
    per_rank = len(rows) // size
    for rank in range(size):
        want = torch.stack(rows[rank * per_rank : (rank + 1) * per_rank])
        assert torch.equal(QkvRows(HEADS, GROUPS, DIM).shard([q, k, v], rank, size), want)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gate_and_up_rows_of_a_rank_stand_together(size: int) -> None:
    gate, up = _random([(8, 6), (8, 6)])
    per_rank = 8 // size
    for rank in range(size):
        own = range(rank * per_rank, (rank + 1) * per_rank)
        want = torch.stack([*(gate[i] for i in own), *(up[i] for i in own)])
        assert torch.equal(GateUpRows().shard([gate, up], rank, size), want)


@pytest.mark.parametrize(("vocab_size", "size"), [(13, 1), (13, 2), (13, 4), (12, 4), (3, 4), (5, 4)])
def test_vocabulary_rows_are_padded_with_zeros(vocab_size: int, size: int) -> None:
    (whole,) = _random([(vocab_size, 6)])
    padded = padded_vocab(vocab_size, size)
    assert vocab_size <= padded < vocab_size + size and padded % size == 0
    rows = [whole[i] if i < vocab_size else torch.zeros(6) for i in range(padded)]
    shards = [VocabRows(vocab_size).shard([whole], rank, size) for rank in range(size)]
    assert torch.equal(torch.cat(shards), torch.stack(rows))
    assert torch.equal(merge(VocabRows(vocab_size), shards)[0], whole)


@pytest.mark.parametrize("has_scalar_head", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_family_maps_every_tensor_once(has_scalar_head: bool, is_tied: bool, size: int) -> None:
    mapped = parameter_map(replace(SHAPE, is_tied=is_tied), has_scalar_head)
    assert len({p.megatron for p in mapped}) == len(mapped)
    exported = [name for p in mapped if not p.is_copy for name in p.hf]
    assert len(set(exported)) == len(exported)
    assert ("lm_head.weight" in exported) == (not is_tied and not has_scalar_head)
    assert ("score.weight" in exported) == has_scalar_head
    for parameter in mapped:
        tensors = _random(parameter.hf_shapes)
        shards = [parameter.layout.shard(tensors, rank, size) for rank in range(size)]
        for got, want in zip(merge(parameter.layout, shards), tensors, strict=True):
            assert torch.equal(got, want), parameter.megatron
