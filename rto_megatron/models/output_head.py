"""Reads a vocabulary that is split over tensor ranks, a chunk of positions at a time: all logits never exist at once.

Legend: N positions that are asked for, C of a chunk, v columns of this tensor rank, h hidden size, k numbers that are
read of a position, m numbers that a rank's shard gives for one.

A reading is made of sums over the vocabulary. Each rank takes its own columns' part of them, chunk by chunk, and when
all chunks are done the parts are added up over the tensor ranks, once. The backward pass computes the logits of a
chunk again, turns them into their gradient, and multiplies that out at once into those of states and projection.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rto_megatron.models.logit_shaping import UNSHAPED, LogitShaping
from rto_megatron.types import BannedTargets

_COLUMNS = 8192  # of a product that is added up in float32: bounds its copy in the model's dtype


@dataclass(frozen=True)
class Targets:
    """The targets of the positions that are asked for, and of what distribution.

    Example:
        Targets(targets_N=tensor([7, 9]), temperature=0.7)
    """

    targets_N: Tensor  # int64
    banned: BannedTargets | None = None  # of these positions; None: the whole vocabulary has probability
    temperature: float = 1.0  # by which logits are divided before their softmax


@dataclass(frozen=True)
class Shard:
    """This tensor rank's columns of the vocabulary, padding left out.

    Example:
        Shard.of(weight_vh, vocab_size, group)
    """

    first: int
    num_columns: int  # 0 where there is nothing but padding
    group: dist.ProcessGroup

    @classmethod
    def of(cls, weight_vh: Tensor, vocab_size: int, group: dist.ProcessGroup) -> "Shard":
        """The columns of a rank of `group`, each of which has as many rows of the padded projection."""
        first = group.rank() * len(weight_vh)
        return cls(first, max(0, min(len(weight_vh), vocab_size - first)), group)

    def locate(self, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        """Whether a target is in this shard, and its column, or a valid one."""
        column_C = targets_C - self.first
        is_own_C = (column_C >= 0) & (column_C < self.num_columns)
        return is_own_C, column_C.where(is_own_C, 0)

    def chosen(self, logits_Cv: Tensor, targets_C: Tensor) -> Tensor:
        """The targets' logits [C], 0 on the ranks that do not have them."""
        if not self.num_columns:
            return logits_Cv.new_zeros(len(targets_C))
        is_own_C, column_C = self.locate(targets_C)
        return logits_Cv.gather(1, column_C[:, None])[:, 0].where(is_own_C, 0)

    def largest(self, logits_Cv: Tensor) -> Tensor:
        """The largest logit of each position in this shard [C]; finite where there is none."""
        lowest = torch.finfo(logits_Cv.dtype).min
        if not self.num_columns:
            return logits_Cv.new_full((len(logits_Cv),), lowest)
        return logits_Cv.amax(1).clamp_(min=lowest)

    def over_all(self, largest_xN: Tensor) -> tuple[Tensor, Tensor]:
        """The largest of all tensor ranks, and by how much this rank's is below it; every rank must call it."""
        if self.group.size() == 1:
            return largest_xN, torch.zeros_like(largest_xN)
        overall_xN = largest_xN.clone()
        dist.all_reduce(overall_xN, dist.ReduceOp.MAX, group=self.group)
        return overall_xN, largest_xN - overall_xN

    def total(self, sums_mN: Tensor) -> Tensor:
        """Adds up over the tensor ranks, in place; every rank must call it."""
        if self.group.size() > 1:
            dist.all_reduce(sums_mN, group=self.group)
        return sums_mN

    def add_to_targets(self, gradient_Cv: Tensor, targets_C: Tensor, values_C: Tensor) -> Tensor:
        """Adds to the column of each target that is in this shard, in place."""
        is_own_C, column_C = self.locate(targets_C)
        return gradient_Cv.scatter_add_(1, column_C[:, None], values_C.where(is_own_C, 0)[:, None])


@dataclass(frozen=True)
class OutputProjection:
    """A language model's last product, from states to logits, as a tensor rank holds it.

    Example:
        OutputProjection(weight_vh, vocab_size=32000, group=topology.tensor_group())
    """

    weight_vh: Tensor  # this tensor rank's rows, padding included
    vocab_size: int  # rows from here on, of all ranks, are padding and get no probability
    group: dist.ProcessGroup  # the tensor ranks, each of which has as many rows
    shaping: LogitShaping = UNSHAPED  # what the family does to logits

    @property
    def shard(self) -> Shard:
        """The columns of the vocabulary that this rank computes."""
        return Shard.of(self.weight_vh, self.vocab_size, self.group)


class Statistic(Protocol):
    """What is read of the logits of each position; see `read_in_chunks`.

    Example:
        statistic.part(logits_Cv, slice(0, 64))
    """

    def part(self, logits_Cv: Tensor, rows: slice) -> Tensor:
        """This shard's part [m, C]. Speaks with nobody; may overwrite its argument."""
        ...

    def combined(self, parts_mN: Tensor) -> tuple[Tensor, Tensor]:
        """What is read [k, N], and what `gradient` needs of it [n, N]; every tensor rank calls it."""
        ...

    def gradient(self, logits_Cv: Tensor, rows: slice, kept_nC: Tensor, grad_kC: Tensor) -> Tensor:
        """The gradient of this shard's logits [C, v]. Speaks with nobody; may overwrite its first argument."""
        ...


def read_in_chunks(
    hidden_Nh: Tensor, projection: OutputProjection, statistic: Statistic, chunk: int
) -> Tensor:
    """What a statistic reads of softmax(shaping(hidden @ weight.T)), in float32, differentiable in both.

    Every rank of the projection's group must call it, with the same states.

    Args:
        hidden_Nh: what the projection reads. Its gradient is this rank's part, to be added up over the ranks.
        chunk: positions whose logits exist at a time.

    Returns:
        [k, N], equal on all tensor ranks.
    """
    outputs_kN: Tensor = _Reading.apply(  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
        hidden_Nh, projection.weight_vh, projection.shard, statistic, chunk, projection.shaping
    )
    return outputs_kN


class _Context(FunctionCtx):
    """What `forward` leaves for `backward`."""

    shard: Shard
    statistic: Statistic
    chunk: int
    shaping: LogitShaping
    saved_tensors: tuple[Tensor, ...]


class _Reading(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden_Nh: Tensor,
        weight_vh: Tensor,
        shard: Shard,
        statistic: Statistic,
        chunk: int,
        shaping: LogitShaping,
    ) -> Tensor:
        own_vh = weight_vh[: shard.num_columns]
        # The chunk's logits are nobody else's: a name for them here would keep them beside the next chunk's.
        parts = [
            statistic.part(shaping.logits(hidden_Nh[rows], own_vh), rows)
            for rows in _chunks(hidden_Nh, chunk)
        ]
        outputs_kN, kept_nN = statistic.combined(torch.cat(parts, 1))
        ctx.save_for_backward(hidden_Nh, weight_vh, kept_nN)
        ctx.shard, ctx.statistic, ctx.chunk, ctx.shaping = shard, statistic, chunk, shaping
        return outputs_kN

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_kN: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden_Nh, weight_vh, kept_nN = ctx.saved_tensors
        num_columns, dtype = ctx.shard.num_columns, hidden_Nh.dtype
        grad_hidden_Nh = torch.zeros_like(hidden_Nh)
        # Chunks are added up without rounding in between, one chunk needs no such copy.
        wide = dtype if len(hidden_Nh) <= ctx.chunk else torch.float32
        grad_weight_vh = torch.zeros_like(weight_vh, dtype=wide)  # rows of padding keep the 0
        own_vh = weight_vh[:num_columns]
        for rows in _chunks(hidden_Nh, ctx.chunk) if num_columns else ():
            logits_Cv = ctx.shaping.logits(hidden_Nh[rows], own_vh)
            slope_Cv = ctx.shaping.slope(logits_Cv)
            shaped_Cv = ctx.statistic.gradient(logits_Cv, rows, kept_nN[:, rows], grad_kN[:, rows])
            grad_Cv = ctx.shaping.through(shaped_Cv, slope_Cv).to(dtype)
            del logits_Cv, slope_Cv, shaped_Cv
            grad_hidden_Nh[rows] = grad_Cv @ own_vh
            _add_product(grad_weight_vh[:num_columns], grad_Cv, hidden_Nh[rows])
            del grad_Cv  # which would lie beside the next chunk's logits
        return grad_hidden_Nh, grad_weight_vh.to(dtype), None, None, None, None


def _chunks(hidden_Nh: Tensor, chunk: int) -> Iterator[slice]:
    """At least one: without positions it is empty, and the ranks meet all the same."""
    return (slice(start, start + chunk) for start in range(0, max(1, len(hidden_Nh)), chunk))


def _add_product(total_vh: Tensor, grad_Cv: Tensor, hidden_Ch: Tensor) -> None:
    if total_vh.dtype == grad_Cv.dtype:
        total_vh.addmm_(grad_Cv.t(), hidden_Ch)
        return
    for first in range(0, len(total_vh), _COLUMNS):
        columns = slice(first, first + _COLUMNS)
        total_vh[columns].add_(grad_Cv[:, columns].t() @ hidden_Ch)
