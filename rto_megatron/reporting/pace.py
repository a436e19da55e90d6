"""Finds the rank that lets the others wait, by the seconds that each computes alone and by what it has to compute."""

import statistics
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from rto_megatron.types import LossOutput

RATIO = "time/slowest_rank_ratio"
LOAD_RATIO = "time/busiest_rank_ratio"
_SLOW_RATIO = 2.0
_SLOW_S = 0.5  # of a step; less is noise


class Pace:
    """Sums, over the optimizer steps of one step, the time from the start of the pass to its last loss.

    Gradients are reduced after that. Tensor-parallel ranks meet in every layer and so share the pace of their slowest;
    pipeline stages without a loss have none.

    Example:
        pace = Pace()
        model.gradients(microbatches, pace.timing(loss), names)
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock  # seconds since any moment
        self._seconds = 0.0

    def timing[M](self, loss: Callable[[Tensor, M], LossOutput]) -> Callable[[Tensor, M], LossOutput]:
        """`loss`, which notes when it was last called; make one for each pass, right before it."""
        reached = self._clock()

        def timed(outputs: Tensor, micro: M) -> LossOutput:
            nonlocal reached
            output = loss(outputs, micro)
            now = self._clock()
            self._seconds += now - reached
            reached = now
            return output

        return timed

    def take(self) -> float:
        """The seconds since the last call; 0 on a rank that computed no loss."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def slowest(seconds: Sequence[float]) -> tuple[int, float] | None:
    """The slowest rank and its time over the median; None where fewer than two ranks have a time.

    Args:
        seconds: by rank; 0 is no time.
    """
    found = [one for one in seconds if one > 0]
    if len(found) < 2:
        return None
    rank = max(range(len(seconds)), key=lambda one: seconds[one])
    return rank, seconds[rank] / statistics.median_low(found)


def busiest(flops: Sequence[float]) -> float | None:
    """What the busiest rank computes over the mean of all; None for one rank, or where nothing was computed.

    Args:
        flops: by rank.
    """
    total = sum(flops)
    return max(flops) * len(flops) / total if len(flops) > 1 and total > 0 else None


def slow_rank(seconds: Sequence[float], step: int) -> str | None:
    """A sentence about a rank that is much slower than the others."""
    found = slowest(seconds)
    if found is None:
        return None
    rank, ratio = found
    if ratio < _SLOW_RATIO or seconds[rank] * (1 - 1 / ratio) < _SLOW_S:
        return None
    return (
        f"warning: step {step}: rank {rank} needs {ratio:.1f} times as long as the median rank, {seconds[rank]:.1f} s; "
        "look at what else runs on its machine, or at its GPU"
    )
