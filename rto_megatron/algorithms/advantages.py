"""From token rewards to advantages: generalised advantage estimation and whitening on a [B, R] grid."""

from collections.abc import Callable

import torch
from torch import Tensor

from rto_megatron.algorithms.losses import keep
from rto_megatron.algorithms.token_rewards import at_last_token

# Sums a tensor over the data-parallel ranks; every rank must call it equally often.
AllSum = Callable[[Tensor], Tensor]


def gae(
    rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, gamma: float, lam: float, bootstrap_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.

    Args:
        rewards_BR: reward of each action.
        values_BR: value of the state before each action.
        mask_BR: 1 on actions, a prefix of each row; what lies behind counts as 0.
        gamma: discount per token.
        lam: lambda of the estimator.
        bootstrap_B: value of the state behind the last action; 0 where the response is over.

    Returns:
        Advantages and returns (advantages + values), shape [B, R] each, 0 on padding.

    Source: OpenRLHF 0.4.4, ppo_utils/experience_maker.py:get_advantages_and_returns, which never bootstraps.
    """
    rewards_BR, values_BR = keep(rewards_BR, mask_BR), keep(values_BR, mask_BR)
    next_values_BR = values_BR.roll(-1, dims=1)
    next_values_BR[:, -1] = 0
    next_values_BR = next_values_BR + at_last_token(bootstrap_B, mask_BR)
    deltas_BR = rewards_BR + gamma * next_values_BR - values_BR
    advantages_BR = returns_to_go(deltas_BR, mask_BR, gamma * lam)
    return advantages_BR, advantages_BR + values_BR


def returns_to_go(rewards_BR: Tensor, mask_BR: Tensor, gamma: float) -> Tensor:
    """sum_{k >= t} gamma^(k - t) r_k of each action, shape [B, R], 0 on padding."""
    rewards_BR = keep(rewards_BR, mask_BR)
    total_B = torch.zeros_like(rewards_BR[:, 0])
    reversed_totals: list[Tensor] = []
    for reward_B in reversed(rewards_BR.unbind(1)):
        total_B = reward_B + gamma * total_B
        reversed_totals.append(total_B)
    return torch.stack(reversed_totals[::-1], dim=1)


def whiten(x_BR: Tensor, mask_BR: Tensor, all_sum: AllSum) -> Tensor:
    """(x - mean) / std over all unmasked entries of all ranks, 0 elsewhere, shape [B, R].

    Args:
        x_BR: numbers to whiten.
        mask_BR: 1 on the entries that count; may be 0 everywhere on some ranks.
        all_sum: sum over the data-parallel ranks; called twice, by every rank.

    Source: OpenRLHF 0.4.4, ppo_utils/replay_buffer.py:normalize (population variance, at least 1e-8).
    """
    x_BR = keep(x_BR, mask_BR)
    total, count = all_sum(torch.stack([x_BR.sum(), (mask_BR != 0).sum().to(x_BR.dtype)])).unbind()
    count = count.clamp(min=1)
    centred_BR = keep(x_BR - total / count, mask_BR)
    variance = all_sum(centred_BR.square().sum()) / count
    return centred_BR * variance.clamp(min=1e-8).rsqrt()
