"""Direct Preference Optimization, with optional label smoothing (cDPO)."""

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from rto_megatron.algorithms.losses import keep, sequence_sums, to_metrics
from rto_megatron.types import LossOutput, PairMicrobatch


class Config(BaseModel):
    """The paper's defaults (App. D)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    beta: float = Field(default=0.1, gt=0, description="strength of the KL constraint, the paper's beta")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="probability that a label is flipped (cDPO)"
    )


class DPO:
    """L = - (1 - eps) log sigmoid(beta D) - eps log sigmoid(- beta D), mean over pairs.

    D is the difference, chosen minus rejected, of log pi(y|x) - log pi_ref(y|x), summed over the response.
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
        config, weight_P = self.config, micro.weight_P
        logp_S = sequence_sums(logp_T, micro.mask_T, micro.batch)
        logp_2P = keep(logp_S.view(2, -1), weight_P)
        rewards_2P = config.beta * (logp_2P - keep(micro.logp_ref_S.view(2, -1), weight_P))
        margins_P = rewards_2P[0] - rewards_2P[1]
        losses_P = -(1 - config.label_smoothing) * logsigmoid(margins_P)
        losses_P = losses_P - config.label_smoothing * logsigmoid(-margins_P)
        loss = (weight_P * losses_P).sum()
        num_pairs = (weight_P > 0).sum()
        metrics = to_metrics(
            {
                "loss": (loss, weight_P.sum()),
                "rewards/chosen": (rewards_2P[0].sum(), num_pairs),
                "rewards/rejected": (rewards_2P[1].sum(), num_pairs),
                "rewards/accuracies": ((margins_P > 0).sum(), num_pairs),
                "rewards/margins": (margins_P.sum(), num_pairs),
                "logps/chosen": (logp_2P[0].sum(), num_pairs),
                "logps/rejected": (logp_2P[1].sum(), num_pairs),
            }
        )
        return LossOutput(loss, metrics)
