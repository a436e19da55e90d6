"""Advantages against golden numbers and a slow loop of the definition."""

import pytest
import torch
from algorithms.grids import GARBAGE, GOLDEN, close, grid, no_reduction

from rto_megatron.algorithms.advantages import gae, returns_to_go, whiten

MASK = grid(GOLDEN["gae_inputs"]["action_mask"])
REWARDS = grid(GOLDEN["rto_reward_b1_0.05_clip_0.05"]["token_reward"])
VALUES = grid(GOLDEN["gae_inputs"]["values"])
OVER = grid([0.0, 0.0])  # nothing follows the last token


@pytest.mark.parametrize(
    ("gamma", "lam", "key"), [(1.0, 0.95, "gae_gamma1_lambda0.95"), (0.99, 0.9, "gae_gamma0.99_lambda0.9")]
)
def test_gae_equals_golden(gamma, lam, key):
    advantages_BR, returns_BR = gae(REWARDS, VALUES, MASK, gamma, lam, OVER)
    close(advantages_BR, GOLDEN[key]["advantages"])
    close(returns_BR, GOLDEN[key]["returns"])


def test_gae_equals_the_sum_of_discounted_errors():
    generator = torch.Generator().manual_seed(0)
    rewards_BR, values_BR = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    lengths, gamma, lam = (7, 4, 1), 0.97, 0.8
    mask_BR = grid([[float(t < length) for t in range(7)] for length in lengths])
    advantages_BR, _ = gae(rewards_BR, values_BR, mask_BR, gamma, lam, grid([0.0, 0.0, 0.0]))
    for row, length in enumerate(lengths):
        reward, value = rewards_BR[row].tolist(), [*values_BR[row, :length].tolist(), 0.0]
        deltas = [reward[t] + gamma * value[t + 1] - value[t] for t in range(length)]
        expected = [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(length)]
        close(advantages_BR[row, :length], expected)
        assert not advantages_BR[row, length:].any()


def ragged(seed):
    """Rewards and values [4, 7] with garbage behind the ends, the mask, the lengths, and what follows each row."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (7, 4, 1, 6)
    mask_BR = grid([[float(t < length) for t in range(7)] for length in lengths])
    rewards_BR, values_BR = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    bootstrap_B = torch.randn(4, generator=generator, dtype=torch.float64)
    garbage_BR = GARBAGE * (1 - mask_BR)
    return rewards_BR + garbage_BR, values_BR - garbage_BR, mask_BR, lengths, bootstrap_B


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.97, 0.0), (0.97, 1.0)])
def test_gae_continues_with_the_value_behind_the_last_token(gamma, lam):
    rewards_BR, values_BR, mask_BR, lengths, bootstrap_B = ragged(1)
    bootstrap_B[3] = 0.0  # a response that is over
    advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, gamma, lam, bootstrap_B)
    for row, length in enumerate(lengths):
        value = [*values_BR[row, :length].tolist(), float(bootstrap_B[row])]
        expected, following = [0.0] * length, 0.0
        for t in reversed(range(length)):
            following = float(rewards_BR[row, t]) + gamma * value[t + 1] - value[t] + gamma * lam * following
            expected[t] = following
        close(advantages_BR[row, :length], expected)
        close(returns_BR[row, :length], [a + v for a, v in zip(expected, value, strict=False)])
        assert not advantages_BR[row, length:].any() and not returns_BR[row, length:].any()


def test_bootstrapped_return_is_the_discounted_value_and_rewards_where_lambda_is_one():
    rewards_BR, values_BR, mask_BR, lengths, bootstrap_B = ragged(2)
    _, returns_BR = gae(rewards_BR, values_BR, mask_BR, 0.9, 1.0, bootstrap_B)
    for row, length in enumerate(lengths):
        expected = [
            sum(0.9 ** (k - t) * float(rewards_BR[row, k]) for k in range(t, length))
            + 0.9 ** (length - t) * float(bootstrap_B[row])
            for t in range(length)
        ]
        close(returns_BR[row, :length], expected)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_to_go_are_the_discounted_sums_of_the_rewards_to_come(gamma):
    rewards_BR, _, mask_BR, lengths, _ = ragged(3)
    returns_BR = returns_to_go(rewards_BR, mask_BR, gamma)
    for row, length in enumerate(lengths):
        expected = [
            sum(gamma ** (k - t) * float(rewards_BR[row, k]) for k in range(t, length)) for t in range(length)
        ]
        close(returns_BR[row, :length], expected)
        assert not returns_BR[row, length:].any()


def test_gae_ignores_rewards_and_values_behind_the_mask():
    garbage_BR = GARBAGE * (1 - MASK)
    dirty = gae(REWARDS + garbage_BR, VALUES - garbage_BR, MASK, 1.0, 0.95, OVER)
    for clean_BR, dirty_BR in zip(gae(REWARDS, VALUES, MASK, 1.0, 0.95, OVER), dirty, strict=True):
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


@pytest.mark.parametrize(("deviation", "expected"), [(1e-3, 1.0), (1e-4, 1.0), (1e-5, 0.1)])
def test_a_standard_deviation_counts_as_1e_4_where_it_is_below(deviation, expected):
    whitened_BR = whiten(grid([[-deviation, deviation]]), grid([[1, 1]]), no_reduction)
    close(whitened_BR, [[-expected, expected]])
