"""Poisoned numbers never reach the weights: updates that are refused are noted, counted, and end the run in the end."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rto_megatron.engine.absent import TrainedRole
from rto_megatron.engine.finite import EmptyUpdateError, PoisonedError
from rto_megatron.engine.megatron import Microbatch
from rto_megatron.engine.readings import Reading
from rto_megatron.errors import RecipeError, UserError
from rto_megatron.parallel.topology import Topology
from rto_megatron.reporting.progress import say
from rto_megatron.trainer.run import Run
from rto_megatron.types import LossOutput, Metrics

POISONED_FILE = "poisoned.jsonl"
SKIPPED = "update/skipped_fraction"


class LossChange(Protocol):
    """Makes another loss of a loss, whatever it reads.

    Example:
        changed = change(loss)
    """

    def __call__[M](self, loss: Callable[[Tensor, M], LossOutput]) -> Callable[[Tensor, M], LossOutput]:
        """The loss to take in its place."""
        ...


class Update(Protocol):
    """One model's part of an optimizer step.

    Example:
        settle = update.accumulate(change)
        metrics = settle() | update.apply()
    """

    @property
    def is_paced(self) -> bool:
        """Whether its forward and backward passes count in the pace of a rank."""
        ...

    def accumulate(self, change: LossChange) -> Callable[[], Metrics]:
        """Accumulates its gradients; all ranks must call it and what it returns, see `TrainedModel.accumulate`."""
        ...

    def apply(self) -> Metrics:
        """Steps its optimizer with them; all ranks must call it."""
        ...


@dataclass(frozen=True)
class ModelUpdate[M: Microbatch]:
    """An update of a model by a loss.

    Args:
        microbatches: this replica's share, whose weights hold the loss's denominator.
        names: ids of the samples of each micro-batch.
        reading: what the loss sees of the model; None: log-probs, or values with a scalar head.
        is_paced: see `Update`.

    Example:
        ModelUpdate(policy, microbatches, loss, names, lr=1e-6)
    """

    model: TrainedRole
    microbatches: Sequence[M]
    loss: Callable[[Tensor, M], LossOutput]
    names: Sequence[Sequence[str]]
    lr: float
    reading: Reading[M] | None = None
    is_paced: bool = True

    def accumulate(self, change: LossChange) -> Callable[[], Metrics]:
        """See `Update.accumulate`."""
        return self.model.accumulate(self.microbatches, change(self.loss), self.names, self.reading)

    def apply(self) -> Metrics:
        """See `Update.apply`."""
        return self.model.apply(self.lr)


class NotFiniteError(UserError):
    """Every update was refused for some time: the run cannot go on by itself."""

    reason = "NAN"


class Guard:
    """Skips updates on poisoned numbers; `<run>/poisoned.jsonl` keeps step, finding and sample ids of each.

    Every rank has one and sees the same refusals: `PoisonedError` is raised by all ranks together.

    Args:
        run: its folder and metrics.
        max_skipped: refusals in a row that end the run.

    Example:
        Guard(run, max_skipped=3, topology=topology).step([update])
    """

    def __init__(self, run: Run, max_skipped: int, topology: Topology) -> None:
        self._run = run
        self._max_skipped = max_skipped
        self._is_lead = topology.is_lead

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Leaves the block where something in it is poisoned.

        Raises:
            NotFiniteError: on every rank, when updates have been refused so often in a row.
            RecipeError: as it, where the last had no token to train on.
        """
        try:
            yield
        except PoisonedError as refusal:
            self._refuse(refusal)

    @property
    def step_number(self) -> int:
        """The number of the step that is being made, counted from 1."""
        return self._run.step + 1

    def step(self, updates: Sequence[Update]) -> None:
        """One optimizer step of every model, inside `skipping`; all ranks must call it.

        All gradients come first: where one of them is refused, no model is stepped. No rank hears of another before it
        has made its own passes, so models of different ranks make theirs at the same time.

        Raises:
            PoisonedError: on every rank, when a loss or gradient of any rank is NaN or infinite.
        """
        passes = [one.accumulate(self.loss_change(one)) for one in updates]
        metrics = [settle() for settle in passes]
        metrics += self.apply(updates)
        for part in metrics:
            self._run.record(part)
        self._run.refused_in_a_row = 0
        self._run.record({SKIPPED: (0.0, 1.0)})

    def loss_change(self, update: Update) -> LossChange:
        """What is done to the loss of an update."""
        return self._run.pace.timing if update.is_paced else _as_it_is

    def apply(self, updates: Sequence[Update]) -> list[Metrics]:
        """Steps the optimizers, once all gradients are sound."""
        return [one.apply() for one in updates]

    def _refuse(self, refusal: PoisonedError) -> None:
        in_a_row = self._run.refused_in_a_row = self._run.refused_in_a_row + 1
        self._run.record({SKIPPED: (1.0, 1.0)})
        step, path = self.step_number, self._run.dir / POISONED_FILE
        if self._is_lead:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "found": refusal.found}) + "\n")
        say(f"warning: step {step}: {refusal}; the update is skipped", self._is_lead)
        if in_a_row >= self._max_skipped:
            message = (
                f"step {step}: {in_a_row} updates in a row were refused, the last because {refusal}; {path} "
                f"names all samples. The last checkpoint in {self._run.dir} is sound: {refusal.advice}"
            )
            raise RecipeError(message) if isinstance(refusal, EmptyUpdateError) else NotFiniteError(message)


def _as_it_is[M](loss: Callable[[Tensor, M], LossOutput]) -> Callable[[Tensor, M], LossOutput]:
    return loss
