"""Responses as they come in: whole micro-batches of a draw, while the pool still samples the others."""

from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from rto_megatron.types import Rollout

# Told of responses that came before the others, on all ranks of the replica alike: those of whole micro-batches.
type Hear = Callable[[Sequence[Rollout]], None]


class Arrivals:
    """Responses of one request, on the rank that asked: a thread puts them, and another takes them.

    What is handed on together is decided by their places in the request alone: micro-batches are composed as they will
    be once all responses are there, and so hold the same numbers.

    Args:
        num_responses: of the request.
        micro: sequences of a micro-batch; the last one may hold fewer.

    Example:
        Arrivals(num_responses=64, micro=4).put(17, rollout)
    """

    def __init__(self, num_responses: int, micro: int) -> None:
        self._micro = micro
        # By micro-batch.
        self._num_missing = [min(micro, num_responses - first) for first in range(0, num_responses, micro)]
        self._came: dict[int, Rollout] = {}
        self._whole: SimpleQueue[int | None] = SimpleQueue()  # micro-batches; None: no further ones
        self._is_over = False

    def put(self, place: int, rollout: Rollout) -> None:
        """Adds the response to the prompt at `place` of the request."""
        self._came[place] = rollout
        group = place // self._micro
        self._num_missing[group] -= 1
        if not self._num_missing[group]:
            self._whole.put(group)

    def end(self) -> None:
        """Says that the request is over, whatever came of it."""
        self._whole.put(None)

    def take(self) -> list[Rollout]:
        """Waits for whole micro-batches; returns the responses of those that nobody took, or none once it is over.

        What came last is not handed on by itself: it is part of the answer, which is there then.
        """
        if self._is_over:
            return []
        groups = [self._whole.get()]
        try:
            while True:
                groups.append(self._whole.get_nowait())
        except Empty:
            pass
        self._is_over = None in groups
        if self._is_over:
            return []
        first = [group * self._micro for group in sorted(group for group in groups if group is not None)]
        places = (place for start in first for place in range(start, start + self._micro))
        return [self._came[place] for place in places if place in self._came]
