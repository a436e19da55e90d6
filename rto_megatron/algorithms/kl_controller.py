"""The coefficient of the KL penalty over a run: fixed, or steered to a target."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class KLController:
    """`coef` multiplies the KL penalty of the coming step; `target` None keeps it fixed.

    Example:
        KLController(coef=0.1, target=6.0, horizon=10_000).update(mean_kl, num_sequences=512)
    """

    coef: float
    target: float | None  # nats per token
    horizon: int  # sequences, at least `smallest_horizon`

    def update(self, mean_kl: float, num_sequences: int) -> "KLController":
        """The controller of the next step.

        coef *= 1 + clip(mean_kl / target - 1, -0.2, 0.2) num_sequences / horizon

        Args:
            mean_kl: k1 of the step, mean over its tokens on all ranks, nats (metric `policy/kl_per_token`).
            num_sequences: responses of the step on all ranks.

        Source: OpenRLHF 0.4.4, ppo_utils/kl_controller.py (Ziegler et al., arXiv 1909.08593, section 2.2).
        """
        if self.target is None:
            return self
        error = min(max(mean_kl / self.target - 1, -0.2), 0.2)
        return replace(self, coef=self.coef * (1 + error * num_sequences / self.horizon))

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps; the rest is configuration."""
        return {"coef": self.coef}

    def restored(self, state: Mapping[str, float]) -> Self:
        """This controller at the coefficient of a checkpoint; a fixed one keeps its configured one."""
        return self if self.target is None else replace(self, coef=state["coef"])


def smallest_horizon(num_sequences: int) -> int:
    """The least horizon at which a step of so many sequences leaves the coefficient above 0, the lowest factor being
    1 - 0.2 num_sequences / horizon."""
    return num_sequences // 5 + 1
