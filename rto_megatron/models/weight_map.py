"""How tensors of a Hugging Face checkpoint make up Megatron parameters: invertible layouts, one map per family.

The same map is played forward for import and backward for export and for weight sync, so the two cannot drift apart.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

TensorReader = Callable[[str, tuple[int, ...]], Tensor]  # (Hugging Face name, expected shape) -> tensor


@dataclass(frozen=True)
class TensorRun:
    """Consecutive indices of one of a parameter's Hugging Face tensors, along the layout's dimension; may be empty.

    Example:
        TensorRun(tensor=1, start=64, length=64)
    """

    tensor: int
    start: int
    length: int


class ShardLayout(Protocol):
    """An invertible way from Hugging Face tensors to the shard of one tensor rank.

    A shard consists of runs of the tensors. Of every run, the ranks' shares follow each other in their order, and the
    runs of one tensor do so too.

    Example:
        own = layout.shard([tensor], rank=1, size=2)
    """

    @property
    def dim(self) -> int | None:
        """Along which every rank holds runs of the Hugging Face tensors; None: all of them."""

    def shard(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """The part of tensor rank `rank` of `size`."""

    def runs(self, lengths: Sequence[int], rank: int, size: int) -> tuple[TensorRun, ...]:
        """What of the Hugging Face tensors a rank holds, without their data.

        Args:
            lengths: of the tensors along `dim`, or their first dimension.
        """

    def pieces(self, shard: Tensor, rank: int, size: int) -> tuple[Tensor, ...]:
        """The runs of the Hugging Face tensors that a shard holds, as `runs`, views where that is possible."""


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole tensor.

    Example:
        Replicated().shard([norm], rank=1, size=2)
    """

    @property
    def dim(self) -> None:
        return None

    def shard(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return tensors[0]

    def runs(self, lengths: Sequence[int], rank: int, size: int) -> tuple[TensorRun, ...]:
        return (TensorRun(0, 0, lengths[0]),)

    def pieces(self, shard: Tensor, rank: int, size: int) -> tuple[Tensor, ...]:
        return (shard,)


class _Cut:
    """Every rank holds one run of each tensor."""

    def runs(self, lengths: Sequence[int], rank: int, size: int) -> tuple[TensorRun, ...]:
        return tuple(TensorRun(tensor, *cut(length, rank, size)) for tensor, length in enumerate(lengths))


@dataclass(frozen=True)
class Split(_Cut):
    """Cut along one dimension (0: column-parallel, 1: row-parallel).

    Example:
        Split(0).shard([embedding], rank=1, size=2)
    """

    dim: int

    def shard(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return tensors[0].chunk(size, self.dim)[rank]

    def pieces(self, shard: Tensor, rank: int, size: int) -> tuple[Tensor, ...]:
        return (shard,)


class _Rows:
    @property
    def dim(self) -> int:
        return 0


@dataclass(frozen=True)
class VocabRows(_Rows, _Cut):
    """Rows of the vocabulary, padded with zeros to a multiple of the tensor size and cut back on the way out.

    Example:
        VocabRows(vocab_size=128256)
    """

    vocab_size: int

    def shard(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        rows = padded_vocab(self.vocab_size, size) // size
        own = tensors[0][rank * rows : (rank + 1) * rows]
        return (
            torch.cat([own, own.new_zeros(rows - own.shape[0], *own.shape[1:])])
            if own.shape[0] < rows
            else own
        )

    def pieces(self, shard: Tensor, rank: int, size: int) -> tuple[Tensor, ...]:
        _, length = cut(self.vocab_size, rank, size)
        return (shard[:length],)


@dataclass(frozen=True)
class QkvRows(_Rows):
    """q, k, v -> rows interleaved by key-value group: [q of the group's heads | k | v] for each group.

    Ranks hold equal runs of these rows: whole groups, or parts of one where there are fewer groups than ranks. There
    Megatron gathers a group's activations on each of its ranks, and sums what they say of it in the backward pass.

    Example:
        QkvRows(num_heads=32, num_kv_heads=8, head_dim=128)
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def shard(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        left = [
            tensor[run.start : run.start + run.length]
            for tensor, run in zip(tensors, self.runs((), rank, size), strict=True)
        ]
        rows = []
        for tensor, length in self._segments(rank, size):
            rows.append(left[tensor][:length])
            left[tensor] = left[tensor][length:]
        return torch.cat(rows)

    def runs(self, lengths: Sequence[int], rank: int, size: int) -> tuple[TensorRun, ...]:
        first, end = self._bounds(rank, size)
        before = zip(self._before(first), self._before(end), strict=True)
        return tuple(TensorRun(tensor, start, stop - start) for tensor, (start, stop) in enumerate(before))

    def pieces(self, shard: Tensor, rank: int, size: int) -> tuple[Tensor, ...]:
        segments = list(self._segments(rank, size))
        parts: tuple[list[Tensor], ...] = ([], [], [])
        for (tensor, _), rows in zip(segments, shard.split([n for _, n in segments]), strict=True):
            parts[tensor].append(rows)
        return tuple(part[0] if len(part) == 1 else torch.cat(part) if part else shard[:0] for part in parts)

    @property
    def _group(self) -> tuple[int, int, int]:
        """Rows of q, k and v of one group."""
        return self.num_heads // self.num_kv_heads * self.head_dim, self.head_dim, self.head_dim

    def _bounds(self, rank: int, size: int) -> tuple[int, int]:
        rows = sum(self._group) * self.num_kv_heads // size
        return rank * rows, (rank + 1) * rows

    def _before(self, row: int) -> tuple[int, ...]:
        """Rows of q, of k and of v above a row."""
        groups, rest = divmod(row, sum(self._group))
        counts = []
        for rows in self._group:
            counts.append(groups * rows + min(rest, rows))
            rest = max(rest - rows, 0)
        return tuple(counts)

    def _segments(self, rank: int, size: int) -> Iterator[tuple[int, int]]:
        """(tensor, rows) from the top of a shard to its end, none empty."""
        first, end = self._bounds(rank, size)
        at = first // sum(self._group) * sum(self._group)
        while at < end:
            for tensor, rows in enumerate(self._group):
                length = min(at + rows, end) - max(at, first)
                if length > 0:
                    yield tensor, length
                at += rows


@dataclass(frozen=True)
class GateUpRows(_Rows, _Cut):
    """gate, up -> each rank holds [its rows of gate | its rows of up].

    Example:
        GateUpRows().shard([gate, up], rank=1, size=2)
    """

    def shard(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return torch.cat([t.chunk(size)[rank] for t in tensors])

    def pieces(self, shard: Tensor, rank: int, size: int) -> tuple[Tensor, ...]:
        gate, up = shard.chunk(2)
        return gate, up


@dataclass(frozen=True)
class Joined(_Rows):
    """The tensors of another layout as one, lying one below the other: Phi's `qkv_proj` and `gate_up_proj`.

    Example:
        Joined(GateUpRows(), lengths=(8192, 8192))
    """

    parts: ShardLayout
    lengths: tuple[int, ...]  # rows of each

    def shard(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return self.parts.shard(tensors[0].split(self.lengths), rank, size)

    def runs(self, lengths: Sequence[int], rank: int, size: int) -> tuple[TensorRun, ...]:
        starts = [0, *accumulate(self.lengths)]
        runs = self.parts.runs(self.lengths, rank, size)
        return tuple(TensorRun(0, starts[run.tensor] + run.start, run.length) for run in runs)

    def pieces(self, shard: Tensor, rank: int, size: int) -> tuple[Tensor, ...]:
        return self.parts.pieces(shard, rank, size)


def cut(length: int, rank: int, size: int) -> tuple[int, int]:
    """(start, length) of the run that rank `rank` of `size` holds; the last ones are shorter or empty."""
    run = -(-length // size)
    start = min(rank * run, length)
    return start, min(run, length - start)


def merge(layout: ShardLayout, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The Hugging Face tensors, from the shards of all tensor ranks; views where there is one shard."""
    dim = layout.dim
    parts = [layout.pieces(shard, rank, len(shards)) for rank, shard in enumerate(shards)]
    if dim is None:
        return parts[0]
    merged = tuple(runs[0] if len(runs) == 1 else torch.cat(runs, dim) for runs in zip(*parts, strict=True))
    return (torch.cat(merged),) if isinstance(layout, Joined) else merged


@dataclass(frozen=True)
class MappedParameter:
    """One Megatron parameter (layers numbered over the whole model) and the Hugging Face tensors that it holds.

    Example:
        MappedParameter("final_norm", ("model.norm.weight",), ((64,),), Replicated(), layer=None)
    """

    megatron: str
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    layout: ShardLayout
    layer: int | None  # None: embedding or output side
    is_output_side: bool = False  # lives on the last pipeline stage
    is_copy: bool = False  # a tied copy on the last stage: loaded, never exported
    is_float32: bool = False  # kept in float32 whatever the dtype of the model
    expert: int | None = None  # of which expert of its layer it is; None: of none

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """In which a model of dtype `model` keeps it."""
        return torch.float32 if self.is_float32 else model

    @property
    def num_parameters(self) -> int:
        """Numbers in its Hugging Face tensors."""
        return sum(math.prod(size) for size in self.hf_shapes)

    def sizes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of its Hugging Face tensors."""
        return zip(self.hf, self.hf_shapes, strict=True)

    def runs(self, rank: int, size: int) -> tuple[TensorRun, ...]:
        """What of its Hugging Face tensors the shard of rank `rank` of `size` holds."""
        return self.layout.runs([shape[self.layout.dim or 0] for shape in self.hf_shapes], rank, size)


def padded_vocab(vocab_size: int, tensor_size: int) -> int:
    """Smallest multiple of the tensor size that holds the vocabulary; more padding would only move memory."""
    return -(-vocab_size // tensor_size) * tensor_size


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as config.json, manifests and reports write it."""
    return str(dtype).removeprefix("torch.")
