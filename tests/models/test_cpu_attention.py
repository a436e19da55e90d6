"""Attention of 16 bits on a CPU: torch's output, and gradients nearer to those of float64 than torch's."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rto_megatron.models.cpu_attention import attend_short, derives_faster


def _derived(dtype: torch.dtype, is_short: bool, num_tokens: int) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of queries, keys and values: 4 heads in 2 groups."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(2, heads, num_tokens, 32, generator=generator).bfloat16() for heads in (4, 2, 2, 4)]
    *inputs, grad = (x.to(dtype).requires_grad_() for x in made)
    if is_short:
        out = attend_short(*inputs, scale=0.3)
    else:
        out = scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True)
    return out.detach(), list(torch.autograd.grad(out, inputs, grad.detach()))


@pytest.mark.parametrize("num_tokens", [1, 37, 128])
def test_gradients_are_rounded_once(num_tokens: int) -> None:
    _, exact = _derived(torch.float64, False, num_tokens)
    rounded, of_torch = _derived(torch.bfloat16, False, num_tokens)
    out, grads = _derived(torch.bfloat16, True, num_tokens)
    assert torch.equal(out, rounded)
    for found, torchs, want in zip(grads, of_torch, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - want).norm() <= (torchs - want).norm()
        assert (found - want).norm() < 4e-3 * want.norm() + 1e-12


def test_only_short_16_bit_queries_with_gradients_are_taken() -> None:
    def taken(dtype: torch.dtype, num_tokens: int, has_gradient: bool = True, width: int = 8) -> bool:
        query = torch.empty(1, 2, num_tokens, 8, dtype=dtype, requires_grad=has_gradient)
        return derives_faster(query, query[..., :width])

    assert taken(torch.bfloat16, 511)
    assert not taken(torch.bfloat16, 512)
    assert not taken(torch.float32, 8)
    assert not taken(torch.bfloat16, 8, has_gradient=False)
    assert not taken(torch.bfloat16, 8, width=4)
