"""Kahneman-Tversky Optimization (arXiv 2402.01306): single answers that are known to be desirable or not."""

import torch
from pydantic import Field
from torch import Tensor

from rto_megatron.algorithms.losses import keep, sequence_sums
from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.section import Section
from rto_megatron.types import JudgedMicrobatch, LossOutput


class Config(Section):
    """The paper's defaults.

    Example:
        algorithm: {beta: 0.1, undesirable_weight: 1.33}
    """

    beta: float = Field(default=0.1, gt=0, description="strength of the KL constraint, the paper's beta")
    desirable_weight: float = Field(
        default=1.0,
        gt=0,
        description="weight of desirable answers, the paper's lambda_D; raise it where they are few",
    )
    undesirable_weight: float = Field(
        default=1.0,
        gt=0,
        description="weight of undesirable answers, the paper's lambda_U; raise it where they are few",
    )


class KTO:
    """L = lambda_D (1 - sigmoid(beta (r - z0))) or lambda_U (1 - sigmoid(beta (z0 - r))), mean over answers.

    The first for desirable answers, the second for undesirable ones. r is log pi(y|x) - log pi_ref(y|x), summed over
    the response; z0, without gradient, is the KL from the reference as `kl_baseline` estimates it.

    Example:
        KTO(Config(beta=0.1)).loss(logp_T, judged).metrics
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def loss(self, logp_T: Tensor, micro: JudgedMicrobatch) -> LossOutput:
        """Weighted loss; the metrics of desirable answers are called chosen, those of undesirable ones rejected.

        Args:
            logp_T: log-probs of `micro.batch.targets_T` under the policy, nats, shape [T].
            micro: S answers with verdicts, the reference's summed log-probs and the baseline z0.

        Source: arXiv 2402.01306, eq. 8. Metric names: TRL. Its margin is a difference of two means, not a mean:
        whoever reduces the metrics takes it from `rewards/chosen` and `rewards/rejected`.
        """
        config, weight_S = self.config, micro.weight_S
        logp_S = keep(sequence_sums(logp_T, micro.mask_T, micro.batch), weight_S)
        log_ratio_S = logp_S - keep(micro.logp_ref_S, weight_S)
        gain_S = config.beta * (log_ratio_S - micro.baseline.detach())
        losses_S = torch.where(
            micro.is_desirable_S,
            config.desirable_weight * torch.sigmoid(-gain_S),  # 1 - sigmoid(z) loses digits where z is large
            config.undesirable_weight * torch.sigmoid(gain_S),
        )
        loss = (weight_S * losses_S).sum()
        rewards_S = config.beta * log_ratio_S
        chosen_S = (weight_S > 0) & micro.is_desirable_S
        rejected_S = (weight_S > 0) & ~micro.is_desirable_S
        num_answers = (weight_S > 0).sum()
        sums = {
            "loss": (loss, weight_S.sum()),
            "rewards/chosen": (keep(rewards_S, chosen_S).sum(), chosen_S.sum()),
            "rewards/rejected": (keep(rewards_S, rejected_S).sum(), rejected_S.sum()),
            "logps/chosen": (keep(logp_S, chosen_S).sum(), chosen_S.sum()),
            "logps/rejected": (keep(logp_S, rejected_S).sum(), rejected_S.sum()),
            "kl": (micro.baseline * num_answers, num_answers),
        }
        return LossOutput(loss, sums)


def kl_baseline(total: float, count: float) -> float:
    """z0, the estimate of KL(pi || pi_ref) that a batch's answers are judged against, nats, at least 0.

    Args:
        total: sum over the global batch of log pi(y'|x) - log pi_ref(y'|x), y' an answer to another prompt.
        count: the number of these answers.

    Source: arXiv 2402.01306, the estimate of z0 below eq. 8; TRL 1.16, kto_trainer.py:_compute_loss.
    """
    return max(total / max(count, 1), 0.0)


METHOD = OfflineMethod(Config, KTO, examples="judgements", reference="optional")
