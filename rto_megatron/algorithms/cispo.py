"""CISPO (MiniMax-M1, arXiv 2506.13585): the ratio is a bounded weight, and no token loses its gradient to a clip."""

from functools import partial

from pydantic import Field

from rto_megatron.algorithms.grpo import RelativeConfig, relative_policy
from rto_megatron.algorithms.losses import WeightingName
from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.policy_losses import cispo_loss
from rto_megatron.algorithms.reinforcement import PolicyOptimization


class Config(RelativeConfig):
    """No lower bound, as in the paper, which keeps its upper one to itself: that of ScaleRL (arXiv 2510.13786).

    Example:
        algorithm: {clip_eps_high: 4.0}
    """

    clip_eps: float | None = Field(
        default=None, gt=0, lt=1, description="the ratio is at least 1 - it; null: no lower bound"
    )
    clip_eps_high: float = Field(default=4.0, gt=0, description="the ratio is at most 1 + it")
    loss_weights: WeightingName = Field(
        default="token_mean", description="mean over all tokens; or another mean"
    )


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """(score - mean) / deviation, and the log-prob weighted by the bounded ratio."""
    loss = partial(cispo_loss, clip_eps=config.clip_eps, clip_eps_high=config.clip_eps_high)
    return relative_policy(config, loss)


METHOD = OnlineMethod(Config, build, has_critic=False, has_dpo=True)
