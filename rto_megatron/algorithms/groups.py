"""Advantages of responses to one prompt, a group, relative to each other; no critic.

Legend: B responses of this rank, those to one prompt side by side; R response positions.

What is compared is the outcome of a response: its score, and its KL penalty where the reward has one. RTO's DPO
reward and what sources pay tokens stand beside it: the sum of what is still to come, each reward less a baseline of the
group's mean token rewards, as PRIME does with the same kind of reward. Without them the estimators are GRPO's,
Dr. GRPO's and RLOO's.

Source: arXiv 2402.03300, section 4.1.2 (GRPO); 2503.20783, section 3.2 (Dr. GRPO); 2402.14740, eq. 7 (RLOO);
2502.01456, eq. 5 (PRIME: leave-one-out outcome plus returns of token rewards).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rto_megatron.algorithms.advantages import AllSum, returns_to_go
from rto_megatron.algorithms.losses import keep
from rto_megatron.algorithms.reinforcement import Estimator
from rto_megatron.types import ScoredRollouts, TokenRewards

STD_FLOOR = 1e-4  # as TRL adds it: a group of equal scores teaches nothing instead of dividing by zero

Baseline = Callable[[Tensor, int], Tensor]  # (numbers [B], group size) -> [B]


def mean_of_group(x_B: Tensor, group_size: int) -> Tensor:
    """The mean of each response's group, itself included, shape [B]."""
    return x_B.view(-1, group_size).mean(dim=1).repeat_interleave(group_size)


def mean_of_others(x_B: Tensor, group_size: int) -> Tensor:
    """The mean of the other responses of each one's group, shape [B]."""
    groups = x_B.view(-1, group_size)
    return ((groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)).flatten()


def deviation_of_group(x_B: Tensor, group_size: int) -> Tensor:
    """The unbiased standard deviation of each response's group, + 1e-4, shape [B].

    Source: TRL, trainer/grpo_trainer.py for the estimate of the deviation.
    """
    return x_B.view(-1, group_size).std(dim=1).repeat_interleave(group_size) + STD_FLOOR


def group_estimator(group_size: int, baseline: Baseline, is_scaled: bool) -> Estimator:
    """Outcomes and token rewards less their baselines; over the deviation of the group's returns if `is_scaled`."""

    def advantages(
        scored: ScoredRollouts, rewards: TokenRewards, mask_BR: Tensor, all_sum: AllSum
    ) -> tuple[Tensor, Tensor]:
        all_BR = scored.mask_BR
        outcome_B = (rewards.score_BR + rewards.kl_BR).sum(dim=1)
        dense_BR = keep(rewards.dense_BR(), all_BR)
        typical_B = baseline(dense_BR.sum(dim=1) / all_BR.sum(dim=1), group_size)
        relative_BR = (outcome_B - baseline(outcome_B, group_size)).unsqueeze(1) + returns_to_go(
            dense_BR - typical_B.unsqueeze(1), all_BR, gamma=1.0
        )
        if is_scaled:
            relative_BR = relative_BR / deviation_of_group(
                outcome_B + dense_BR.sum(dim=1), group_size
            ).unsqueeze(1)
        returns_BR = outcome_B.unsqueeze(1) + returns_to_go(dense_BR, all_BR, gamma=1.0)
        return keep(relative_BR, mask_BR), keep(returns_BR, all_BR)

    return advantages


def informative(score_B: Tensor, group_size: int) -> Tensor:
    """True for groups whose scores differ: the others have no advantage in their outcome, shape [B / group_size].

    Source: arXiv 2503.14476, section 3.2 (dynamic sampling).
    """
    groups = score_B.view(-1, group_size)
    return torch.any(groups != groups[:, :1], dim=1)
