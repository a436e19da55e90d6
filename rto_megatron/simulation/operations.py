"""Floating-point operations of what a rank runs, as torch counts them, with what torch does not count.

A multiplication with its addition counts two. Of causal attention half the matrix counts; its backward pass computes
the scores once more (Dao et al. 2022), which makes five products of the forward's two.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def _attention(query: Tensor, key: Tensor, *others: object) -> float:
    batch, heads, length, size = query.shape
    return 4.0 * batch * heads * length * key.shape[2] * size


def _is_causal(flags: Sequence[object]) -> bool:
    return any(flag is True for flag in flags)


def _flash(query: Tensor, key: Tensor, value: Tensor, *flags: object) -> float:
    return _attention(query, key) * (0.5 if _is_causal(flags) else 1.0)


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, *flags: object
) -> float:
    return 2.5 * _flash(query, key, value, *flags)


def _grouped(rows: Tensor, weights: Tensor, *_: object) -> float:
    return 2.0 * rows.shape[0] * rows.shape[1] * weights.shape[-1]


_OURS: Mapping[object, Callable[..., float]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
    aten._grouped_mm: _grouped,
}


def flops_of(packet: object, args: Sequence[object], kwargs: Mapping[str, object], out: object) -> float:
    """Operations of one call of torch; 0 of one that is no product of matrices."""
    if packet in _OURS:
        return _OURS[packet](*args)
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0.0
