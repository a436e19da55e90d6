"""From token rewards to advantages: generalised advantage estimation and whitening on a [B, R] grid."""

from collections.abc import Callable

import torch
from torch import Tensor

from rto_megatron.algorithms.losses import keep

AllSum = Callable[
    [Tensor], Tensor
]  # sums a tensor over the data-parallel ranks; every rank must call it equally often


def gae(
    rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation without bootstrap after the last action.

    Args:
        rewards_BR: reward of each action.
        values_BR: value of the state before each action.
        mask_BR: 1 on actions, a prefix of each row; what lies behind counts as 0.
        gamma: discount per token.
        lam: lambda of the estimator.

    Returns:
        Advantages and returns (advantages + values), shape [B, R] each, 0 on padding.

    Source: OpenRLHF 0.4.4, ppo_utils/experience_maker.py:get_advantages_and_returns.
    """
    rewards_BR, values_BR = keep(rewards_BR, mask_BR), keep(values_BR, mask_BR)
    next_value_B = torch.zeros_like(values_BR[:, 0])
    advantage_B = torch.zeros_like(next_value_B)
    reversed_advantages: list[Tensor] = []
    for reward_B, value_B in zip(reversed(rewards_BR.unbind(1)), reversed(values_BR.unbind(1)), strict=True):
        delta_B = reward_B + gamma * next_value_B - value_B
        advantage_B = delta_B + gamma * lam * advantage_B
        reversed_advantages.append(advantage_B)
        next_value_B = value_B
    advantages_BR = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages_BR, advantages_BR + values_BR


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
