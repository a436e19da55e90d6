"""Faults on purpose (`platform.faults`) around the parts of a run; the loops know nothing of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rto_megatron.generation.contract import Arrived, RolloutEngine, Sampling, stream
from rto_megatron.platform import faults
from rto_megatron.trainer.arrivals import Hear
from rto_megatron.trainer.checked_scores import Scorer
from rto_megatron.trainer.guard import Guard, LossChange, Update
from rto_megatron.trainer.sampler import WrappedSampler
from rto_megatron.types import LossOutput, Metrics, Prompt, Rollout, ScoredRollouts


@dataclass(frozen=True)
class PlantedEngine:
    """An engine with a fault while it samples: beside the training where rollouts are drawn ahead.

    Example:
        PlantedEngine(engine).generate(prompts, sampling, version=3)
    """

    inner: RolloutEngine

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        rollouts = self.inner.generate(prompts, sampling, version)
        faults.at("in_gen", version + 1)
        return rollouts

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, arrived: Arrived
    ) -> list[Rollout]:
        """See `StreamingEngine.stream`."""
        rollouts = stream(self.inner, prompts, sampling, version, arrived)
        faults.at("in_gen", version + 1)
        return rollouts


class PlantedSampler(WrappedSampler):
    """A sampler with faults before and after it draws.

    Example:
        PlantedSampler(sampler).draw(step=3)
    """

    def draw(self, step: int, hear: Hear | None = None) -> tuple[Rollout, ...]:
        """See `Sampler.draw`."""
        faults.at("before_gen", step + 1)
        rollouts = super().draw(step, hear)
        faults.at("after_gen", step + 1)
        return rollouts


class PlantedScorer(Scorer):
    """Puts a NaN among the policy's log-probs where the plan wants one.

    Example:
        PlantedScorer(config, setup, roles).opinions(sampled, step=3)
    """

    def opinions(self, sampled: Sequence[Rollout], step: int) -> ScoredRollouts:
        """See `Scorer.opinions`."""
        scored = super().opinions(sampled, step)
        if not faults.at("logprob", step):
            return scored
        logp_old_BR = scored.logp_old_BR.clone()
        logp_old_BR[0, 0] = float("nan")
        return replace(scored, logp_old_BR=logp_old_BR)


class PlantedGuard(Guard):
    """Poisons a loss, and fires between the gradients and the steps of the optimizers.

    Example:
        PlantedGuard(run, max_skipped=3, topology=topology).apply([update])
    """

    def loss_change(self, update: Update) -> LossChange:
        """See `Guard.loss_change`."""
        change = super().loss_change(update)
        if not (update.is_paced and faults.at("fwd_bwd", self.step_number)):
            return change

        def poison[M](loss: Callable[[Tensor, M], LossOutput]) -> Callable[[Tensor, M], LossOutput]:
            def poisoned(outputs: Tensor, micro: M) -> LossOutput:
                output = loss(outputs, micro)
                return replace(output, loss=output.loss * float("nan"))

            return change(poisoned)

        return poison

    def apply(self, updates: Sequence[Update]) -> list[Metrics]:
        """See `Guard.apply`."""
        faults.at("opt_step", self.step_number)
        return super().apply(updates)
