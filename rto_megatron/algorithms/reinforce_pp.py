"""REINFORCE++ (arXiv 2501.03262): PPO's clipped loss without a critic, on whitened returns of the token rewards."""

from functools import partial

from torch import Tensor

from rto_megatron.algorithms.advantages import AllSum, returns_to_go, whiten
from rto_megatron.algorithms.losses import clipped_policy_loss
from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.reinforcement import PolicyOptimization, RewardConfig, TokenReward
from rto_megatron.algorithms.token_rewards import ppo_rewards
from rto_megatron.types import ScoredRollouts, TokenRewards


class Config(RewardConfig):
    """Nothing of its own.

    Example:
        algorithm: {beta_kl: 0.01, gamma: 1.0}
    """


def critic_free(
    config: RewardConfig, token_reward: TokenReward, needs_dpo: bool = False
) -> PolicyOptimization:
    """Whitened discounted returns and the clipped policy loss around any token reward."""

    def advantages(
        scored: ScoredRollouts, rewards: TokenRewards, mask_BR: Tensor, all_sum: AllSum
    ) -> tuple[Tensor, Tensor]:
        returns_BR = returns_to_go(rewards.total_BR(), scored.mask_BR, config.gamma)
        return whiten(returns_BR, mask_BR, all_sum), returns_BR

    return PolicyOptimization(
        config=config,
        token_reward=token_reward,
        advantages=advantages,
        policy_loss=partial(clipped_policy_loss, clip_eps=config.clip_eps),
        value_loss=None,
        kl_controller=config.kl_controller(),
        needs_dpo=needs_dpo,
    )


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """Score on the last token, KL penalty on every token."""
    return critic_free(config, ppo_rewards)


METHOD = OnlineMethod(Config, build, has_critic=False)
