"""Poisoned numbers never reach the weights: updates that are refused are noted, counted, and end the run in the end."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from rto_megatron.engine.finite import EmptyUpdateError, PoisonedError
from rto_megatron.errors import UserError
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform import faults
from rto_megatron.reporting.progress import say
from rto_megatron.trainer.run import Run
from rto_megatron.types import LossOutput

POISONED_FILE = "poisoned.jsonl"
SKIPPED = "update/skipped_fraction"


class NotFiniteError(UserError):
    """Every update was refused for some time: the run cannot go on by itself."""

    reason = "NAN"


class Guard:
    """Skips updates on poisoned numbers; `<run>/poisoned.jsonl` keeps step, finding and sample ids of each.

    Every rank has one and sees the same refusals: `PoisonedError` is raised by all ranks together.

    Args:
        run: its folder and metrics.
        max_skipped: refusals in a row that end the run.
    """

    def __init__(self, run: Run, max_skipped: int, topology: Topology) -> None:
        self._run = run
        self._max_skipped = max_skipped
        self._is_lead = topology.is_lead

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Leaves the block where something in it is poisoned; call `stepped` at the end of a block that stepped.

        Raises:
            NotFiniteError: on every rank, when updates have been refused so often in a row.
            UserError: as it, where the last had no token to train on.
        """
        try:
            yield
        except PoisonedError as refusal:
            self._refuse(refusal)

    def stepped(self) -> None:
        """Counts an update that was made."""
        self._run.refused_in_a_row = 0
        self._run.record({SKIPPED: (0.0, 1.0)})

    def _refuse(self, refusal: PoisonedError) -> None:
        in_a_row = self._run.refused_in_a_row = self._run.refused_in_a_row + 1
        self._run.record({SKIPPED: (1.0, 1.0)})
        step, path = self._run.step + 1, self._run.dir / POISONED_FILE
        if self._is_lead:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "found": refusal.found}) + "\n")
        say(f"warning: step {step}: {refusal}; the update is skipped", self._is_lead)
        if in_a_row >= self._max_skipped:
            message = (
                f"step {step}: {in_a_row} updates in a row were refused, the last because {refusal}; {path} "
                f"names all samples. The last checkpoint in {self._run.dir} is sound: {refusal.advice}"
            )
            raise UserError(message) if isinstance(refusal, EmptyUpdateError) else NotFiniteError(message)


def planted[M](loss: Callable[[Tensor, M], LossOutput], step: int) -> Callable[[Tensor, M], LossOutput]:
    """`loss`, or NaN in its place where a fault plan wants it at this step (counted from 1)."""
    if not faults.at("fwd_bwd", step):
        return loss

    def poisoned(outputs: Tensor, micro: M) -> LossOutput:
        output = loss(outputs, micro)
        return replace(output, loss=output.loss * float("nan"))

    return poisoned
