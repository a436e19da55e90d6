"""Norms are their definition, part by part of the rows, and keep no float32 copy of what they read."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from rto_megatron.models.norms import RMSNorm, ShiftedRMSNorm

HIDDEN = 4096  # of which a part has 32 rows
SHAPE = (5, 15, HIDDEN)  # two parts and a smaller one
DTYPES = [torch.float32, torch.bfloat16]


def _norm(kind: type[RMSNorm], dtype: torch.dtype) -> RMSNorm:
    torch.manual_seed(1)
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, params_dtype=dtype)
    norm = kind(config, HIDDEN, 1e-3)
    with torch.no_grad():
        norm.weight += 0.3 * torch.randn(HIDDEN, dtype=dtype)
    return norm


def _definition(norm: RMSNorm, x: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
    """Hugging Face's LlamaRMSNorm and GemmaRMSNorm, with statistics in `wide`, derived by torch."""
    normed = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + norm.eps)
    if isinstance(norm, ShiftedRMSNorm):
        return (normed * (1 + weight.to(wide))).to(weight.dtype)
    return (weight * normed.to(x.dtype)).to(weight.dtype)


@pytest.mark.parametrize("kind", [RMSNorm, ShiftedRMSNorm])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)  # float32 with weights of 16 bits: a residual in float32
def test_a_norm_is_its_definition(kind: type[RMSNorm], dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    norm = _norm(kind, dtype)
    # Heads lie beside each other in memory, with others between the rows of one.
    x = torch.randn(*SHAPE[:2], 3 * HIDDEN).to(x_dtype)[..., HIDDEN : 2 * HIDDEN].requires_grad_()
    y, slope = norm(x), torch.randn(SHAPE, dtype=dtype)
    assert torch.equal(y, _definition(norm, x, norm.weight, torch.float32))
    got = torch.autograd.grad(y, [x, norm.weight], slope)
    exact = [one.detach().double().requires_grad_() for one in (x, norm.weight)]
    want = torch.autograd.grad(_definition(norm, *exact, torch.float64), exact, slope.double())
    for name, one, other in zip(("states", "weight"), got, want, strict=True):
        assert one.dtype == (x_dtype if name == "states" else dtype)
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error < (1e-6 if one.dtype == torch.float32 else 2**-8), f"{name}: {error}"


@pytest.mark.parametrize("kind", [RMSNorm, ShiftedRMSNorm])
def test_a_norm_keeps_what_it_reads_and_a_number_a_row(kind: type[RMSNorm]) -> None:
    norm, kept = _norm(kind, torch.bfloat16), []
    x = torch.randn(SHAPE, dtype=torch.bfloat16, requires_grad=True)

    def keep(one: Tensor) -> Tensor:
        kept.append(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        norm(x)
    assert [one.numel() for one in kept] == [x.numel(), HIDDEN, SHAPE[0] * SHAPE[1]]
    assert kept[0].data_ptr() == x.data_ptr()
