"""Advantages against golden numbers and a slow loop of the definition."""

import pytest
import torch
from algorithms.grids import GARBAGE, GOLDEN, close, grid, no_reduction

from rto_megatron.algorithms.advantages import gae, whiten

MASK = grid(GOLDEN["gae_inputs"]["action_mask"])
REWARDS = grid(GOLDEN["rto_reward_b1_0.05_clip_0.05"]["token_reward"])
VALUES = grid(GOLDEN["gae_inputs"]["values"])


@pytest.mark.parametrize(
    ("gamma", "lam", "key"), [(1.0, 0.95, "gae_gamma1_lambda0.95"), (0.99, 0.9, "gae_gamma0.99_lambda0.9")]
)
def test_gae_equals_golden(gamma, lam, key):
    advantages_BR, returns_BR = gae(REWARDS, VALUES, MASK, gamma, lam)
    close(advantages_BR, GOLDEN[key]["advantages"])
    close(returns_BR, GOLDEN[key]["returns"])


def test_gae_equals_the_sum_of_discounted_errors():
    generator = torch.Generator().manual_seed(0)
    rewards_BR, values_BR = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    lengths, gamma, lam = (7, 4, 1), 0.97, 0.8
    mask_BR = grid([[float(t < length) for t in range(7)] for length in lengths])
    advantages_BR, _ = gae(rewards_BR, values_BR, mask_BR, gamma, lam)
    for row, length in enumerate(lengths):
        reward, value = rewards_BR[row].tolist(), [*values_BR[row, :length].tolist(), 0.0]
        deltas = [reward[t] + gamma * value[t + 1] - value[t] for t in range(length)]
        expected = [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(length)]
        close(advantages_BR[row, :length], expected)
        assert not advantages_BR[row, length:].any()


def test_gae_ignores_rewards_and_values_behind_the_mask():
    garbage_BR = GARBAGE * (1 - MASK)
    dirty = gae(REWARDS + garbage_BR, VALUES - garbage_BR, MASK, 1.0, 0.95)
    for clean_BR, dirty_BR in zip(gae(REWARDS, VALUES, MASK, 1.0, 0.95), dirty, strict=True):
        assert torch.equal(clean_BR, dirty_BR)


def test_whitening_equals_golden():
    advantages_BR = grid(GOLDEN["gae_gamma1_lambda0.95"]["advantages"])
    close(whiten(advantages_BR, MASK, no_reduction), GOLDEN["advantage_normalization"]["normalized"])


def test_whitening_ignores_what_the_mask_hides():
    advantages_BR = grid(GOLDEN["gae_gamma1_lambda0.95"]["advantages"]) + GARBAGE * (1 - MASK)
    close(whiten(advantages_BR, MASK, no_reduction), GOLDEN["advantage_normalization"]["normalized"])


def test_whitening_over_two_ranks_equals_one_rank():
    advantages_BR = grid(GOLDEN["gae_gamma1_lambda0.95"]["advantages"])
    count, mean = 8.0, GOLDEN["advantage_normalization"]["mean"]
    totals = iter(
        [grid([mean * count, count]), grid(GOLDEN["advantage_normalization"]["var_population"] * count)]
    )
    first_rank_BR = whiten(advantages_BR[:1], MASK[:1], lambda _: next(totals))
    close(first_rank_BR, GOLDEN["advantage_normalization"]["normalized"][:1])


def test_whitening_sends_its_own_sums_to_the_other_ranks():
    sent = []

    def record(x):
        sent.append(x)
        return x

    whiten(grid([[1.0, 3.0, 50.0]]), grid([[1, 1, 0]]), record)
    close(sent[0], [4.0, 2.0])
    close(sent[1], 2.0)


@pytest.mark.parametrize("mask", [[[1.0, 1.0]], [[0.0, 0.0]]])
def test_whitening_constant_or_absent_advantages_gives_zeros(mask):
    assert torch.equal(whiten(grid([[2.0, 2.0]]), grid(mask), no_reduction), grid([[0.0, 0.0]]))
