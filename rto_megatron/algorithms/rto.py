"""Reinforced Token Optimization (arXiv 2404.18922): PPO with a DPO model's implicit reward on every token.

Everything but the token reward is PPO's; with `beta_dpo` 0 the two are bit-equal.
"""

from rto_megatron.algorithms import ppo
from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.reinforcement import DpoRewardConfig, PolicyOptimization
from rto_megatron.algorithms.token_rewards import Redistribution, as_it_is


class Config(ppo.Config, DpoRewardConfig):
    """PPO's keys and the two of the DPO reward.

    Example:
        algorithm: {beta_kl: 0.05, beta_dpo: 0.05}
    """


def with_dpo_reward(config: Config, redistribute: Redistribution) -> PolicyOptimization:
    """PPO with a DPO reward, paid on the tokens that `redistribute` chooses."""
    return ppo.actor_critic(config, config.token_reward(redistribute), needs_dpo=config.beta_dpo != 0)


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """r_t = beta_dpo log(pi_dpo / pi_ref) - beta_kl log(pi / pi_ref), plus the score at the end (eq. 4.7)."""
    return with_dpo_reward(config, as_it_is)


METHOD = OnlineMethod(Config, build, has_dpo=True)
