"""Proximal Policy Optimization from human feedback: the baseline, and everything of RTO but its token reward."""

from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor

from rto_megatron.algorithms.advantages import AllSum, gae, whiten
from rto_megatron.algorithms.losses import clipped_value_loss
from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.reinforcement import ClipConfig, PolicyOptimization, RewardConfig
from rto_megatron.algorithms.token_rewards import TokenReward, ppo_rewards
from rto_megatron.types import ScoredRollouts, TokenRewards


class Config(RewardConfig, ClipConfig):
    """Adds the critic's keys.

    Example:
        algorithm: {beta_kl: 0.1, lam: 0.95, value_clip: 0.2}
    """

    lam: float = Field(default=0.95, ge=0, le=1, description="lambda of generalised advantage estimation")
    value_clip: float | None = Field(
        default=0.2, gt=0, description="largest rewarded move of a value; null: no clip"
    )
    critic_warmup_steps: int = Field(
        default=0, ge=0, description="rollout steps at the start that train the critic alone"
    )
    truncated: Literal["compat", "penalise", "bootstrap", "mask"] = Field(  # type: ignore[assignment]  # a narrower default
        default="penalise",
        description="responses cut by the length limit: `compat` overwrites the last token with end-of-"
        "sequence, as the released code does; `penalise` lowers their score; `bootstrap` takes the critic's "
        "value of what would follow in place of a score; `mask` does not train on them",
    )


def actor_critic(config: Config, token_reward: TokenReward, needs_dpo: bool = False) -> PolicyOptimization:
    """Generalised advantage estimation and clipped losses around any token reward."""

    def advantages(
        scored: ScoredRollouts, rewards: TokenRewards, mask_BR: Tensor, all_sum: AllSum
    ) -> tuple[Tensor, Tensor]:
        advantages_BR, returns_BR = gae(
            rewards.total_BR(), scored.values_BR, scored.mask_BR, config.gamma, config.lam, scored.bootstrap_B
        )
        return whiten(advantages_BR, mask_BR, all_sum), returns_BR

    return PolicyOptimization(
        config=config,
        token_reward=token_reward,
        advantages=advantages,
        policy_loss=config.surrogate(),
        value_loss=partial(clipped_value_loss, value_clip=config.value_clip),
        kl_controller=config.kl_controller(),
        needs_dpo=needs_dpo,
        critic_warmup_steps=config.critic_warmup_steps,
    )


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """Score on the last token, KL penalty on every token (eq. 2.3)."""
    return actor_critic(config, ppo_rewards)


METHOD = OnlineMethod(Config, build)
