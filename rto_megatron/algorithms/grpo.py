"""Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300): a response is compared with its siblings."""

from pydantic import Field

from rto_megatron.algorithms.groups import group_estimator, mean_of_group
from rto_megatron.algorithms.kl_controller import KLController
from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.policy_losses import Loss, with_kl
from rto_megatron.algorithms.reinforcement import (
    ClipConfig,
    GroupConfig,
    OptionalDpoConfig,
    PolicyOptimization,
)
from rto_megatron.algorithms.token_rewards import score_rewards


class RelativeConfig(GroupConfig, OptionalDpoConfig):
    """What GRPO's kin share: the KL is a term of the loss, not of the reward.

    Example:
        algorithm: {samples_per_prompt: 8, beta_dpo: 0.05}
    """

    beta_kl: float = Field(default=0.0, ge=0, description="weight of the KL term of the loss; 0: none")


class Config(RelativeConfig, ClipConfig):
    """DeepSeekMath's KL weight.

    Example:
        algorithm: {beta_kl: 0.04, samples_per_prompt: 8}
    """

    beta_kl: float = Field(default=0.04, ge=0, description="weight of the KL term of the loss")


def relative_policy(config: RelativeConfig, loss: Loss, is_scaled: bool = True) -> PolicyOptimization:
    """Scores relative to the group's mean on every token, and k3 to the reference beside `loss`.

    Args:
        is_scaled: whether they are divided by the group's standard deviation.
    """
    return PolicyOptimization(
        config=config,
        token_reward=config.token_reward(beside=score_rewards),
        advantages=group_estimator(config.samples_per_prompt, mean_of_group, is_scaled),
        policy_loss=with_kl(loss, config.beta_kl),
        value_loss=None,
        kl_controller=KLController(config.beta_kl, None, 1),
        needs_dpo=config.beta_dpo != 0,
    )


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """(score - mean) / deviation, and PPO's clipped loss."""
    return relative_policy(config, config.surrogate())


METHOD = OnlineMethod(Config, build, has_critic=False, has_dpo=True)
