"""Direct Preference Optimization (arXiv 2305.18290), with optional label smoothing (cDPO), and IPO (2310.12036)."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.algorithms.preference import (
    preference_output,
    reference_logprobs,
    response_sums,
    smoothed_logsigmoid,
)
from rto_megatron.section import Section
from rto_megatron.types import LossOutput, PairMicrobatch


class Config(Section):
    """The defaults of the RTO paper (App. D).

    Example:
        algorithm: {beta: 0.1, loss: ipo}
    """

    beta: float = Field(
        default=0.1, gt=0, description="strength of the KL constraint, DPO's beta and IPO's tau"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="probability that a label is flipped (cDPO)"
    )
    loss: Literal["sigmoid", "ipo"] = Field(
        default="sigmoid",
        description="sigmoid: Bradley-Terry; ipo: squared distance to the margin 1 / (2 beta)",
    )

    def unread(self) -> Mapping[str, str]:
        """`label_smoothing`, which IPO has not."""
        why = "with loss='ipo'; remove it or set loss to sigmoid"
        return {"label_smoothing": why} if self.loss == "ipo" else {}


class DPO:
    """L = - (1 - eps) log sigmoid(beta D) - eps log sigmoid(- beta D), or (D - 1 / (2 beta))^2; mean over pairs.

    D is the difference, chosen minus rejected, of log pi(y|x) - log pi_ref(y|x), summed over the response. IPO takes
    the same sum; TRL's takes the mean over the tokens, so its beta is not comparable.

    Example:
        DPO(Config(beta=0.1)).loss(logp_T, pairs).metrics
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def loss(self, logp_T: Tensor, micro: PairMicrobatch) -> LossOutput:
        """Weighted preference loss.

        Args:
            logp_T: log-probs of `micro.batch.targets_T` under the policy, nats, shape [T].
            micro: P pairs, the chosen sequences first, with the reference's summed log-probs.

        Source: eric-mitchell/direct-preference-optimization, trainers.py:preference_loss. Metric names: TRL.
        """
        config = self.config
        logp_2P = response_sums(logp_T, micro)
        log_ratio_2P = logp_2P - reference_logprobs(micro)
        rewards_2P = config.beta * log_ratio_2P
        if config.loss == "ipo":
            losses_P = (log_ratio_2P[0] - log_ratio_2P[1] - 1 / (2 * config.beta)).square()
        else:
            losses_P = -smoothed_logsigmoid(rewards_2P[0] - rewards_2P[1], config.label_smoothing)
        return preference_output(losses_P, rewards_2P, logp_2P, micro)


METHOD = OfflineMethod(Config, DPO, examples="pairs", reference="optional")
