"""Group Sequence Policy Optimization (arXiv 2507.18071): the ratio is that of the response, not of a token."""

from pydantic import Field

from rto_megatron.algorithms.grpo import RelativeConfig, relative_policy
from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.policy_losses import sequence_clipped_loss
from rto_megatron.algorithms.reinforcement import ClipConfig, PolicyOptimization


class Config(RelativeConfig, ClipConfig):
    """The paper's clip, narrow as a mean over tokens moves little; no KL.

    Example:
        algorithm: {clip_eps: 3.0e-4, clip_eps_high: 4.0e-4}
    """

    clip_eps: float = Field(default=3e-4, gt=0, lt=1, description="epsilon of the policy's clip")
    clip_eps_high: float | None = Field(
        default=4e-4, gt=0, description="epsilon of the clip's upper bound; null: clip_eps"
    )


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """(score - mean) / deviation, and the clipped loss of the response's ratio."""
    return relative_policy(config, config.surrogate(sequence_clipped_loss))


METHOD = OnlineMethod(Config, build, has_critic=False, has_dpo=True)
