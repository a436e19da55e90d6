"""Model FLOPs against published figures: NVIDIA's own counts of Llama 3, and active parameters of experts."""

from dataclasses import replace

import pytest

from rto_megatron.models.model_flops import forward_flops, weights_per_token
from rto_megatron.models.shape import Experts
from rto_megatron.planning.shapes import KNOWN_SHAPES


@pytest.mark.parametrize(
    ("name", "billions", "tokens_per_s", "tflops"),
    [
        # Megatron-Bridge 25.11, docs/performance-summary.md: tokens/s and TFLOP/s of a GPU at 8192 tokens.
        ("llama-3-8b", 7.505, 14451, 744),
        ("llama-3-70b", 69.50, 1602, 719),
    ],
)
def test_llama_3_as_nvidia_counts_it(name: str, billions: float, tokens_per_s: int, tflops: int) -> None:
    shape = KNOWN_SHAPES[name]
    assert weights_per_token(shape, False) / 1e9 == pytest.approx(billions, rel=1e-3)
    a_token = 3 * forward_flops(shape, False, [8192]) / 8192
    assert a_token * tokens_per_s / 1e12 == pytest.approx(tflops, rel=2e-3)


def test_a_token_meets_the_experts_that_it_is_sent_to() -> None:
    # Mixtral-8x7B: of 8 experts in each of 32 layers a token passes 2; 12.9e9 active parameters with the embedding.
    experts = Experts(8, 2, 14336, tuple(range(32)), is_normalized=True)
    dense = KNOWN_SHAPES["llama-3-8b"]
    shape = replace(dense, family="mixtral", vocab_size=32000, experts=experts)
    assert (weights_per_token(shape, False) + 32000 * 4096) / 1e9 == pytest.approx(12.88, rel=1e-3)


def test_sequences_are_counted_by_themselves_and_a_scalar_head_costs_a_row() -> None:
    shape = KNOWN_SHAPES["llama-3-8b"]
    apart = forward_flops(shape, False, [300, 500])
    assert apart == forward_flops(shape, False, [300]) + forward_flops(shape, False, [500])
    assert apart < forward_flops(shape, False, [800])
    assert weights_per_token(shape, False) - weights_per_token(shape, True) == 4096 * (128256 - 1)


def test_a_window_counts_the_pairs_in_it() -> None:
    shape = KNOWN_SHAPES["gemma-3-1b"]
    pairs = [
        min(token + 1, 512) for token in range(2000)
    ]  # the own one and those before, in one of 22 layers
    whole = [token + 1 for token in range(2000)]
    # Half of the own pairs is left out by the formula, as everywhere: s^2 / 2 instead of s (s + 1) / 2.
    counted = 22 * (sum(pairs) - 512 / 2) + 4 * (sum(whole) - 2000 / 2)
    attention = 2 * 2 * 4 * 256 * counted  # scores and values, each 2 operations for 4 heads of 256
    assert forward_flops(shape, True, [2000]) == 2 * weights_per_token(shape, True) * 2000 + attention
    # Where no layer is named, all have the window, as in Mistral.
    attention = 2 * 2 * 4 * 256 * 26 * (sum(pairs) - 512 / 2)
    everywhere = replace(shape, windowed_layers=())
    assert forward_flops(everywhere, True, [2000]) == 2 * weights_per_token(shape, True) * 2000 + attention
