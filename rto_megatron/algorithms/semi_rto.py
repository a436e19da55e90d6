"""Semi-RTO, an ablation of the paper (section 5.2): the DPO rewards of a sentence are paid together at its end.

The paper does not say what ends a sentence. Here it is a token whose text holds one of `delimiters`; what follows the
last one is paid on the last token.
"""

from collections.abc import Mapping
from functools import partial

from pydantic import Field

from rto_megatron.algorithms import rto
from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.reinforcement import PolicyOptimization
from rto_megatron.algorithms.token_rewards import at_sentence_ends


class Config(rto.Config):
    """RTO's keys and what ends a sentence.

    Example:
        algorithm: {beta_dpo: 0.05, delimiters: [".", ";"]}
    """

    delimiters: tuple[str, ...] = Field(
        default=(".", "!", "?", "\n"),
        min_length=1,
        description="a token whose text holds one of these ends a sentence",
    )

    def unread(self) -> Mapping[str, str]:
        """Without a DPO reward, `delimiters` too."""
        why = "with beta_dpo=0; remove it or give beta_dpo a weight"
        return {**super().unread(), **({"delimiters": why} if self.beta_dpo == 0 else {})}


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """RTO with sentence-level DPO rewards."""
    return rto.with_dpo_reward(config, partial(at_sentence_ends, delimiter_ids=vocabulary(config.delimiters)))


METHOD = OnlineMethod(Config, build, has_dpo=True)
