"""How tensors of a Hugging Face checkpoint make up Megatron parameters: invertible layouts, one map per family.

The same map is played forward for import and backward for export and for weight sync, so the two cannot drift apart.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TensorReader = Callable[[str, tuple[int, ...]], Tensor]  # (Hugging Face name, expected shape) -> tensor


class ShardLayout(Protocol):
    """An invertible way from Hugging Face tensors to the shard of one tensor rank.

    Example:
        own = layout.shard([tensor], rank=1, size=2)
    """

    @property
    def dim(self) -> int | None:
        """Along which every rank holds a run of each Hugging Face tensor (`cut`); None: all of it."""

    def shard(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """The part of tensor rank `rank` of `size`."""

    def pieces(self, shard: Tensor, rank: int, size: int) -> tuple[Tensor, ...]:
        """The runs of the Hugging Face tensors that a shard holds, views where that is possible."""


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

    def pieces(self, shard: Tensor, rank: int, size: int) -> tuple[Tensor, ...]:
        return (shard,)


@dataclass(frozen=True)
class Split:
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
class VocabRows(_Rows):
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

    Example:
        QkvRows(num_heads=32, num_kv_heads=8, head_dim=128)
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def shard(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        groups = [t.unflatten(0, (self.num_kv_heads, -1)) for t in tensors]
        return torch.cat(groups, 1).chunk(size)[rank].flatten(0, 1)

    def pieces(self, shard: Tensor, rank: int, size: int) -> tuple[Tensor, ...]:
        q_rows = self.num_heads // self.num_kv_heads * self.head_dim
        grouped = shard.unflatten(0, (self.num_kv_heads // size, -1))
        return tuple(part.flatten(0, 1) for part in grouped.split([q_rows, self.head_dim, self.head_dim], 1))


@dataclass(frozen=True)
class GateUpRows(_Rows):
    """gate, up -> each rank holds [its rows of gate | its rows of up].

    Example:
        GateUpRows().shard([gate, up], rank=1, size=2)
    """

    def shard(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return torch.cat([t.chunk(size)[rank] for t in tensors])

    def pieces(self, shard: Tensor, rank: int, size: int) -> tuple[Tensor, ...]:
        gate, up = shard.chunk(2)
        return gate, up


def cut(length: int, rank: int, size: int) -> tuple[int, int]:
    """(start, length) of the run that rank `rank` of `size` holds; the last ones are shorter or empty."""
    run = -(-length // size)
    start = min(rank * run, length)
    return start, min(run, length - start)


def merge(layout: ShardLayout, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The Hugging Face tensors, from the shards of all tensor ranks; views where there is one shard."""
    parts = [layout.pieces(shard, rank, len(shards)) for rank, shard in enumerate(shards)]
    dim = layout.dim
    if dim is None or len(shards) == 1:
        return parts[0]
    return tuple(torch.cat(runs, dim) for runs in zip(*parts, strict=True))


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


def padded_vocab(vocab_size: int, tensor_size: int) -> int:
    """Smallest multiple of the tensor size that holds the vocabulary; more padding would only move memory."""
    return -(-vocab_size // tensor_size) * tensor_size


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as config.json, manifests and reports write it."""
    return str(dtype).removeprefix("torch.")
