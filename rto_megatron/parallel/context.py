"""Token rows that are cut over context ranks: which part is whose, and how what was read of the parts comes together.

A row of T positions, whatever sequences it holds, is cut into equal runs, in order of the context ranks. Attention is
the only layer in which they meet (`models/context_attention.py`).
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rto_megatron.parallel.topology import Topology


def own_part(num_tokens: int, topology: Topology) -> slice:
    """The positions of a row that this context rank holds; the context size divides their number."""
    length = num_tokens // topology.context_size
    return slice(topology.context_rank * length, (topology.context_rank + 1) * length)


def whole_rows(part_kt: Tensor, topology: Topology) -> Tensor:
    """The parts of all context ranks, one behind the other: [k, t] -> [k, T]; every context rank must call it.

    Each rank computes the same loss of the whole row, so its part's gradient is whole, and nothing is added up.
    """
    if topology.context_size == 1:
        return part_kt
    whole_kT: Tensor = _Whole.apply(  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
        part_kt, topology.context_group()
    )
    return whole_kT


class _Context(FunctionCtx):
    own: slice


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, part_kt: Tensor, group: dist.ProcessGroup) -> Tensor:
        length = part_kt.shape[1]
        ctx.own = slice(group.rank() * length, (group.rank() + 1) * length)
        parts = [torch.empty_like(part_kt) for _ in range(group.size())]
        dist.all_gather(parts, part_kt.contiguous(), group=group)  # every rank of the context group calls it
        return torch.cat(parts, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_kT: Tensor) -> tuple[Tensor, None]:
        return grad_kT[:, ctx.own], None
