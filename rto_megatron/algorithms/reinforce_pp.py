"""REINFORCE++ (arXiv 2501.03262): PPO's clipped loss without a critic, on whitened returns of the token rewards."""

from torch import Tensor

from rto_megatron.algorithms.advantages import AllSum, returns_to_go, whiten
from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.reinforcement import (
    ClipConfig,
    OptionalDpoConfig,
    PolicyOptimization,
    RewardConfig,
)
from rto_megatron.types import ScoredRollouts, TokenRewards


class Config(RewardConfig, ClipConfig, OptionalDpoConfig):
    """Nothing of its own.

    Example:
        algorithm: {beta_kl: 0.01, gamma: 1.0}
    """


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """Whitened discounted returns and the clipped policy loss; with `beta_dpo` on the reward of eq. 4.7."""

    def advantages(
        scored: ScoredRollouts, rewards: TokenRewards, mask_BR: Tensor, all_sum: AllSum
    ) -> tuple[Tensor, Tensor]:
        returns_BR = returns_to_go(rewards.total_BR(), scored.mask_BR, config.gamma)
        return whiten(returns_BR, mask_BR, all_sum), returns_BR

    return PolicyOptimization(
        config=config,
        token_reward=config.token_reward(),
        advantages=advantages,
        policy_loss=config.surrogate(),
        value_loss=None,
        kl_controller=config.kl_controller(),
        needs_dpo=config.beta_dpo != 0,
    )


METHOD = OnlineMethod(Config, build, has_critic=False, has_dpo=True)
