"""The arms: what each changes in the configuration, and the two controls that are no methods of the paper."""

import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rto_megatron.algorithms.reinforcement import PolicyOptimization
from rto_megatron.algorithms.rto import Config, with_dpo_reward
from rto_megatron.algorithms.token_rewards import ppo_rewards
from rto_megatron.data.true_reward import TrueReward
from rto_megatron.experiments.design import Arm
from rto_megatron.types import ScoredRollouts, TokenRewards


def shuffled(dpo_BR: Tensor, scored: ScoredRollouts) -> Tensor:
    """The DPO rewards of a response in random order: the same sum, no information about tokens."""
    moved_BR = dpo_BR.clone()
    for row, rollout in enumerate(scored.rollouts):
        places = list(range(len(rollout.response_ids)))
        random.Random(f"{rollout.weight_version}/{rollout.prompt_id}").shuffle(places)
        moved_BR[row, : len(places)] = dpo_BR[row, places]
    return moved_BR


def shuffle_dpo_rewards(algorithm: PolicyOptimization, folder: Path) -> PolicyOptimization:
    """RTO whose DPO rewards are shuffled within each response."""
    assert isinstance(algorithm.config, Config)
    return with_dpo_reward(algorithm.config, shuffled)


def pay_true_rewards(algorithm: PolicyOptimization, folder: Path) -> PolicyOptimization:
    """PPO on the true reward of every token, in units of the source's standard deviation, without a reward model."""
    table = TrueReward.load(folder / "task" / "true_reward.json")

    def token_reward(scored: ScoredRollouts, score_B: Tensor, kl_coef: float) -> TokenRewards:
        true_BR = torch.zeros_like(scored.logp_ref_BR)
        for row, rollout in enumerate(scored.rollouts):
            rewards = table.token_rewards(rollout.prompt_ids, rollout.response_ids)
            true_BR[row, : len(rewards)] = torch.tensor(rewards) / table.source_sd
        return replace(ppo_rewards(scored, torch.zeros_like(score_B), kl_coef), score_BR=true_BR)

    return replace(algorithm, token_reward=token_reward)


ARMS = (
    Arm("ppo", "ppo", "ppo"),
    Arm("rto", "rto", "rto"),
    Arm("rto_no_clip", "rto", "rto", ("algorithm.dpo_clip=null",)),
    # The synthetic language has no punctuation: one of its eight words ends a sentence.
    Arm("semi_rto", "semi_rto", "rto", ("algorithm.delimiters=[mat]",)),
    Arm("ddpo", "ddpo", "rto"),
    Arm("rs_ppo", "rs_ppo", "rto"),
    Arm("shuffled_rto", "rto", "rto", control=shuffle_dpo_rewards),
    Arm("dense_oracle", "ppo", "ppo", control=pay_true_rewards),
)
