"""Which items each data-parallel rank takes at each step: shuffled, resumable, the same for any layout."""

import random
from collections.abc import Mapping, Sequence

from rto_megatron.errors import UserError


class Batches[T]:
    """An endless walk over `items` in global batches; the rank sees its slice of each.

    The order of epoch e depends on (seed, e) alone, and rank r of n takes every n-th item of a global batch
    from the r-th on, so neither the global batches nor minibatches cut from them in order depend on n. What
    is left of an epoch after its last full batch is dropped; another shuffle brings it back in later epochs.
    The number of consumed samples is the whole state.
    """

    def __init__(
        self, items: Sequence[T], global_batch: int, seed: int, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        """Start at the first batch.

        Args:
            items: the whole data set, the same on every rank.
            global_batch: items per step, all ranks.
            seed: of the shuffles.
            dp_rank, dp_size: this rank among the data-parallel ranks.

        Raises:
            UserError: fewer items than one global batch, or the ranks do not divide it.
        """
        if len(items) < global_batch:
            raise UserError(
                f"the data has {len(items)} items, fewer than one global batch of {global_batch}; "
                "use more data or a smaller batch"
            )
        if global_batch % dp_size:
            smaller = global_batch - global_batch % dp_size
            raise UserError(
                f"{dp_size} data-parallel ranks do not divide the global batch of {global_batch}; "
                f"use {smaller or dp_size} or {smaller + dp_size}"
            )
        self._items = items
        self._global_batch = global_batch
        self._seed = seed
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._consumed_samples = 0
        self._order_epoch = -1
        self._order: list[int] = []

    @property
    def batches_per_epoch(self) -> int:
        """Full global batches in one pass over the items."""
        return len(self._items) // self._global_batch

    @property
    def epoch(self) -> int:
        """Passes over the items completed so far."""
        return self._consumed_samples // (self.batches_per_epoch * self._global_batch)

    def next_batch(self) -> list[T]:
        """This rank's slice of the next global batch."""
        if self._order_epoch != self.epoch:
            self._order_epoch = self.epoch
            self._order = list(range(len(self._items)))
            random.Random(f"{self._seed}/{self.epoch}").shuffle(self._order)
        per_epoch = self.batches_per_epoch * self._global_batch
        first = self._consumed_samples % per_epoch
        own = self._order[first + self._dp_rank : first + self._global_batch : self._dp_size]
        self._consumed_samples += self._global_batch
        return [self._items[index] for index in own]

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: consumed samples, and the number of items they were taken from."""
        return {"consumed_samples": self._consumed_samples, "num_items": len(self._items)}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue behind the samples that `state` counts.

        Raises:
            UserError: the data has another number of items, or the samples are no multiple of the global
            batch.
        """
        if state["num_items"] != len(self._items):
            raise UserError(
                f"the checkpoint was made with {state['num_items']} items of data and there are "
                f"{len(self._items)}; resume with the data and the length limits of the first run"
            )
        if state["consumed_samples"] % self._global_batch:
            raise UserError(
                f"the checkpoint has consumed {state['consumed_samples']} samples, no multiple of the global "
                f"batch of {self._global_batch}; resume with the batch size of the first run"
            )
        self._consumed_samples = state["consumed_samples"]
