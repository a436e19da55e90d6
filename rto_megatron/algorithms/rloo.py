"""REINFORCE leave-one-out (arXiv 2402.14740): a response is compared with the mean of its siblings, without a ratio."""

from typing import Self

from pydantic import Field, model_validator

from rto_megatron.algorithms.groups import group_estimator, mean_of_others
from rto_megatron.algorithms.losses import WeightingName
from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.policy_losses import reinforce_loss
from rto_megatron.algorithms.reinforcement import (
    GroupConfig,
    KlRewardConfig,
    OptionalDpoConfig,
    PolicyOptimization,
)


class Config(KlRewardConfig, GroupConfig, OptionalDpoConfig):
    """The paper's group; the log-prob of a response is a sum over its tokens, whatever its length.

    Example:
        algorithm: {beta_kl: 0.01, samples_per_prompt: 4}
    """

    samples_per_prompt: int = Field(default=4, ge=2, description="responses sampled for each prompt: a group")
    loss_weights: WeightingName = Field(
        default="constant",
        description="`constant`: sum over tokens over responses x sampling.max_response_tokens; or another mean",
    )

    @model_validator(mode="after")
    def _refuse_stale_passes(self) -> Self:
        if self.epochs != 1:
            raise ValueError(
                f"epochs={self.epochs} passes over responses of a policy that has moved on, and rloo has no ratio that "
                "corrects for it; set epochs to 1, or take a method with a clip, such as grpo"
            )
        return self


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """Score and KL penalty of the response, less the mean of its siblings', times the log-prob."""
    return PolicyOptimization(
        config=config,
        token_reward=config.token_reward(),
        advantages=group_estimator(config.samples_per_prompt, mean_of_others, is_scaled=False),
        policy_loss=reinforce_loss,
        value_loss=None,
        kl_controller=config.kl_controller(),
        needs_dpo=config.beta_dpo != 0,
    )


METHOD = OnlineMethod(Config, build, has_critic=False, has_dpo=True, has_ratio=False)
