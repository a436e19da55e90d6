"""Causal attention of 16 bits on a CPU, with a backward pass in float32.

torch's kernel for CPUs derives short sequences of 16 bits several times slower than those of float32: 5 to 8 ms against
1 to 2 ms for a layer, 9 heads and 100 tokens. Longer ones are as fast.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_SHORT = 512  # tokens, from which on the kernel's own backward pass is as fast
_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def derives_faster(query: Tensor, value: Tensor) -> bool:
    """Whether `attend_short` is the faster way, for queries [b, n, s, d] and as many keys."""
    is_16_bit = query.dtype in (torch.bfloat16, torch.float16)
    is_short = query.shape[2] < _SHORT and query.shape[-1] == value.shape[-1]
    return is_16_bit and is_short and query.device.type == "cpu" and query.requires_grad


def attend_short(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """What scaled_dot_product_attention gives, bit for bit, with gradients that are rounded once.

    Args:
        query, key, value: [b, n, s, d], [b, k, s, d], [b, k, s, d].

    Returns:
        [b, n, s, d].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out: Tensor = _ShortAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    return out


class _Context(FunctionCtx):
    """What `forward` leaves for `backward`."""

    scale: float
    saved_tensors: tuple[Tensor, ...]


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, log_sum = _kernel(query, key, value, 0.0, True, attn_mask=None, scale=scale)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.scale = scale
        attended: Tensor = out
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, log_sum = ctx.saved_tensors
        wide = [x.float() for x in (grad, *inputs)]
        grads: Sequence[Tensor] = _backward(*wide, log_sum, 0.0, True, attn_mask=None, scale=ctx.scale)
        return (*(x.to(grad.dtype) for x in grads), None)
