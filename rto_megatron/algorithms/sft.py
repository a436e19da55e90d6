"""Supervised fine-tuning: cross-entropy of the response tokens, mean over all of them in the global batch."""

from torch import Tensor

from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.section import Section
from rto_megatron.types import LossOutput, SupervisedMicrobatch


class Config(Section):
    """Supervised fine-tuning has nothing to choose.

    Example:
        SFT(Config())
    """


class SFT:
    """L = - (1/N) sum log pi(y_t | .) over the N response tokens of the global batch.

    Example:
        SFT(Config()).loss(logp_T, demonstrations).metrics
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def loss(self, logp_T: Tensor, micro: SupervisedMicrobatch) -> LossOutput:
        """Weighted negative log-likelihood.

        Args:
            logp_T: log-probs of `micro.batch.targets_T`, nats, shape [T].
            micro: tokens and weights.

        Source: OpenRLHF 0.4.4, models/loss.py:GPTLMLoss.
        """
        loss = -(micro.weight_T * logp_T).sum()
        return LossOutput(loss, {"loss": (loss, micro.weight_T.sum())})


METHOD = OfflineMethod(Config, SFT, examples="demonstrations")
