"""R-DPO (arXiv 2403.19159): DPO for rewards that are penalised for length."""

import torch
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
        algorithm: {beta: 0.1, alpha: 0.01}
    """

    beta: float = Field(default=0.1, gt=0, description="strength of the KL constraint, the paper's beta")
    alpha: float = Field(
        default=0.001, ge=0, description="reward that a token costs, the paper's alpha; 0 is DPO"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="probability that a label is flipped (cDPO)"
    )


class RDPO:
    """L = - log sigmoid(beta D + alpha (|y_w| - |y_l|)), mean over pairs; |y| in tokens, end-of-sequence counted.

    D as in DPO. The sign: r - alpha |y| under a KL constraint is maximised by pi ~ pi_ref exp((r - alpha |y|) / beta),
    so r = beta log(pi / pi_ref) + alpha |y| + const, and Bradley-Terry on r has a plus. A longer chosen answer
    thus starts with a larger margin and is pushed less.

    Example:
        RDPO(Config(beta=0.1, alpha=0.01)).loss(logp_T, pairs).metrics
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def loss(self, logp_T: Tensor, micro: PairMicrobatch) -> LossOutput:
        """Weighted preference loss; the rewards in the metrics are DPO's, without the length.

        Args:
            logp_T: log-probs of `micro.batch.targets_T` under the policy, nats, shape [T].
            micro: P pairs, the chosen sequences first, with the reference's summed log-probs.

        Source: arXiv 2403.19159, whose authors released no code. Metric names: TRL.
        """
        config = self.config
        logp_2P = response_sums(logp_T, micro)
        num_tokens_2P = response_sums(torch.ones_like(logp_T), micro)
        rewards_2P = config.beta * (logp_2P - reference_logprobs(micro))
        scores_2P = rewards_2P + config.alpha * num_tokens_2P
        losses_P = -smoothed_logsigmoid(scores_2P[0] - scores_2P[1], config.label_smoothing)
        return preference_output(losses_P, rewards_2P, logp_2P, micro)


METHOD = OfflineMethod(Config, RDPO, examples="pairs", reference="optional")
