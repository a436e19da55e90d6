"""Token-level DPO (arXiv 2404.11999): DPO with a bound on each answer's forward KL to the reference."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.algorithms.preference import preference_output, response_sums
from rto_megatron.section import Section
from rto_megatron.types import LossOutput, PairMicrobatch


class Config(Section):
    """The defaults of the RTO paper (App. D).

    Example:
        algorithm: {beta: 0.1, alpha: 0.5, variant: 2}
    """

    beta: float = Field(default=0.1, gt=0, description="strength of the KL constraint, the paper's beta")
    alpha: float = Field(
        default=0.2, ge=0, description="weight of the difference of the KLs in TDPO2, the paper's alpha"
    )
    variant: Literal[1, 2] = Field(
        default=2,
        description="TDPO1, or TDPO2: weighted, and without gradient through the chosen answer's KL",
    )

    def unread(self) -> Mapping[str, str]:
        """`alpha`, which TDPO1 has not."""
        return {"alpha": "with variant 1; remove it or set variant to 2"} if self.variant == 1 else {}


class TDPO:
    """TDPO1: L = - log sigmoid(beta (u - (D_l - D_w))). TDPO2: L = - log sigmoid(beta (u - alpha (D_l - sg[D_w]))).

    Means over pairs. u is DPO's difference of log-ratios; D_w and D_l are the chosen and the rejected answer's
    sum over response positions of KL(pi_ref || pi) over the whole vocabulary; sg stops the gradient.

    Example:
        TDPO(Config(variant=2)).loss(outputs_3T, pairs).metrics
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def loss(self, outputs_3T: Tensor, micro: PairMicrobatch) -> LossOutput:
        """Weighted preference loss.

        Args:
            outputs_3T: log-probs of `micro.batch.targets_T` under the policy and under the reference, and
                KL(pi_ref || pi) of every position, nats, shape [3, T]; no gradient reaches the second row.
            micro: P pairs, the chosen sequences first; `logp_ref_S` is not read.

        Source: Vance0124/Token-level-Direct-Preference-Optimization, trainers.py:tdpo_loss, with its rewards
        beta (log-ratio + D). Metric names: TRL, and `kl/*`, the D of each answer.
        """
        config = self.config
        logp_2P = response_sums(outputs_3T[0], micro)
        log_ratio_2P = logp_2P - response_sums(outputs_3T[1].detach(), micro)
        kl_2P = response_sums(outputs_3T[2], micro)
        log_ratio_P = log_ratio_2P[0] - log_ratio_2P[1]
        weight, kl_chosen_P = (1.0, kl_2P[0]) if config.variant == 1 else (config.alpha, kl_2P[0].detach())
        losses_P = -logsigmoid(config.beta * (log_ratio_P - weight * (kl_2P[1] - kl_chosen_P)))
        rewards_2P = config.beta * (log_ratio_2P + kl_2P)
        output = preference_output(losses_P, rewards_2P, logp_2P, micro)
        num_pairs = (micro.weight_P > 0).sum()
        kl = {"kl/chosen": (kl_2P[0].sum(), num_pairs), "kl/rejected": (kl_2P[1].sum(), num_pairs)}
        return replace(output, sums={**output.sums, **kl})


METHOD = OfflineMethod(Config, TDPO, examples="pairs", outputs="divergence", reference="required")
