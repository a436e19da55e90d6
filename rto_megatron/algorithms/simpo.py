"""SimPO (arXiv 2405.14734): preferences on the mean log-prob of a token, without a reference."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.algorithms.preference import preference_output, response_sums, smoothed_logsigmoid
from rto_megatron.section import Section
from rto_megatron.types import LossOutput, PairMicrobatch


class Config(Section):
    """The defaults of the RTO paper (App. D).

    Example:
        algorithm: {beta: 2.0, gamma: 1.0, loss: hinge}
    """

    beta: float = Field(default=2.5, gt=0, description="scale of the reward, the paper's beta")
    gamma: float = Field(
        default=0.5,
        ge=0,
        description="margin that the rewards must have, the paper's gamma; not the ratio gamma / beta of SimPO's code",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="probability that a label is flipped"
    )
    loss: Literal["sigmoid", "hinge"] = Field(
        default="sigmoid", description="sigmoid: Bradley-Terry; hinge: linear below a margin of 1"
    )

    def unread(self) -> Mapping[str, str]:
        """`label_smoothing`, which the hinge has not."""
        why = "with loss='hinge'; remove it or set loss to sigmoid"
        return {"label_smoothing": why} if self.loss == "hinge" else {}


class SimPO:
    """L = - log sigmoid(m), or relu(1 - m), mean over pairs.

    m = beta (log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|) - gamma; |y| counts the tokens of a response,
    end-of-sequence included.

    Example:
        SimPO(Config(beta=2.0, gamma=1.0)).loss(logp_T, pairs).metrics
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def loss(self, logp_T: Tensor, micro: PairMicrobatch) -> LossOutput:
        """Weighted preference loss; the rewards are beta times the mean log-prob, `logps/*` are sums as elsewhere.

        Args:
            logp_T: log-probs of `micro.batch.targets_T` under the policy, nats, shape [T].
            micro: P pairs, the chosen sequences first.

        Source: princeton-nlp/SimPO, scripts/simpo_trainer.py:simpo_loss. Metric names: TRL.
        """
        config = self.config
        logp_2P = response_sums(logp_T, micro)
        num_tokens_2P = response_sums(torch.ones_like(logp_T), micro)
        rewards_2P = config.beta * logp_2P / num_tokens_2P.clamp(min=1)
        margins_P = rewards_2P[0] - rewards_2P[1] - config.gamma
        if config.loss == "hinge":
            losses_P = (1 - margins_P).relu()
        else:
            losses_P = -smoothed_logsigmoid(margins_P, config.label_smoothing)
        return preference_output(losses_P, rewards_2P, logp_2P, micro)


METHOD = OfflineMethod(Config, SimPO, examples="pairs", reference="none")
