"""DAPO (arXiv 2503.14476): GRPO with a higher upper clip, a mean over tokens, and groups that teach something.

`truncated: mask` is its overlong filtering; its soft punishment of length is a source's `overlong_buffer_tokens`.
"""

from pydantic import Field

from rto_megatron.algorithms.grpo import RelativeConfig, relative_policy
from rto_megatron.algorithms.losses import WeightingName
from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.reinforcement import ClipConfig, PolicyOptimization


class Config(RelativeConfig, ClipConfig):
    """The paper's clip and group; no KL. As many rounds as in verl's recipe.

    Example:
        algorithm: {samples_per_prompt: 16, clip_eps_high: 0.28, max_sampling_rounds: 10}
    """

    samples_per_prompt: int = Field(
        default=16, ge=2, description="responses sampled for each prompt: a group"
    )
    clip_eps_high: float | None = Field(
        default=0.28, gt=0, description="epsilon of the clip's upper bound; null: clip_eps"
    )
    loss_weights: WeightingName = Field(
        default="token_mean", description="mean over all tokens; or another mean"
    )
    max_sampling_rounds: int | None = Field(
        default=10,
        ge=1,
        description="batches of prompts that a step may sample until it is full of groups whose scores differ; null: "
        "one, and every group is trained on",
    )


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """(score - mean) / deviation, and the clipped loss with two epsilons."""
    return relative_policy(config, config.surrogate())


METHOD = OnlineMethod(Config, build, has_critic=False, has_dpo=True)
