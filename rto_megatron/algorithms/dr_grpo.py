"""Dr. GRPO (arXiv 2503.20783): GRPO without its two biases, the division by deviations and by lengths."""

from pydantic import Field

from rto_megatron.algorithms.grpo import RelativeConfig, relative_policy
from rto_megatron.algorithms.losses import WeightingName
from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.reinforcement import ClipConfig, PolicyOptimization


class Config(RelativeConfig, ClipConfig):
    """A token weighs the same in short and long responses; no KL, as in the paper.

    Example:
        algorithm: {samples_per_prompt: 8, loss_weights: constant}
    """

    loss_weights: WeightingName = Field(
        default="constant",
        description="`constant`: sum over tokens over responses x sampling.max_response_tokens; or another mean",
    )


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """Score - mean, and PPO's clipped loss."""
    return relative_policy(config, config.surrogate(), is_scaled=False)


METHOD = OnlineMethod(Config, build, has_critic=False, has_dpo=True)
