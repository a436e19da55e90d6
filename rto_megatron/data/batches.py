"""Deals items to the data-parallel ranks at each step: shuffled, resumable, the same for any layout."""

import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from rto_megatron.data.grouping import own_share
from rto_megatron.data.mixture import Portion, pass_order
from rto_megatron.errors import DataError, RecipeError
from rto_megatron.types import Demonstration, Example, JudgedResponse, PreferencePair, Prompt


@dataclass(frozen=True)
class BatchesState:
    """Where a walk stands, and over what; what a checkpoint keeps of it.

    Example:
        BatchesState(consumed_samples=640, num_items=1000)
    """

    consumed_samples: int  # of all ranks
    num_items: int
    digest: str | None = None  # of the items; None: a checkpoint that does not say


class Batches[T: Example]:
    """An endless walk over `items` in global batches; the rank sees its slice of each.

    The order of epoch e depends on (seed, e) alone, and rank r of n takes every n-th item of a global batch
    from the r-th on, so neither the global batches nor minibatches cut from them in order depend on n. Where items have
    costs, ranks take about as much of a global batch each, in unequal numbers. What
    is left of an epoch after its last full batch is dropped; another shuffle brings it back in later epochs.
    The number of consumed samples is the whole state; the items' number and digest go with it, to know them again.
    A pass over a mixture takes of each part as much as its weight says. Passes go on where the one before stopped in a
    shuffle of the part, so that all of its items are read equally often in the long run.

    Example:
        Batches(items, global_batch=64, seed=42, dp_rank=0, dp_size=4).next_batch()
    """

    def __init__(
        self,
        items: Sequence[T],
        global_batch: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        cost: Callable[[T], float] | None = None,
        portions: Sequence[Portion] = (),
    ) -> None:
        """Start at the first batch.

        Args:
            items: the whole data set, the same on every rank.
            global_batch: items per step, all ranks.
            seed: of the shuffles.
            dp_rank, dp_size: this rank among the data-parallel ranks.
            cost: what an item asks of a rank; None: all the same.
            portions: of the parts of a mixture, whose items stand one after another; none: every item once a pass.

        Raises:
            UserError: fewer items than one global batch, or the ranks do not divide it where they must.
        """
        assert not portions or sum(portion.num_items for portion in portions) == len(items)
        is_plain = all(portion.weight == 1 for portion in portions)
        self._portions = (Portion(len(items), 1.0),) if is_plain else tuple(portions)
        self._per_pass = sum(portion.per_pass for portion in self._portions)
        if self._per_pass < global_batch:
            raise DataError(
                f"the data has {self._per_pass} items, fewer than one global batch of {global_batch}; "
                "use more data or a smaller batch"
            )
        if cost is None and global_batch % dp_size:
            smaller = global_batch - global_batch % dp_size
            raise RecipeError(
                f"{dp_size} data-parallel ranks do not divide the global batch of {global_batch}; "
                f"use {smaller or dp_size} or {smaller + dp_size}"
            )
        self._items = items
        self._global_batch = global_batch
        self._seed = seed
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._cost = cost
        self._consumed_samples = 0
        self._order_epoch = -1
        self._order: list[int] = []

    @property
    def items(self) -> Sequence[T]:
        """The whole data set."""
        return self._items

    @property
    def batches_per_epoch(self) -> int:
        """Full global batches in one pass over the items."""
        return self._per_pass // self._global_batch

    @property
    def items_per_pass(self) -> int:
        """Items of a pass, before the last full batch and behind it."""
        return self._per_pass

    @property
    def epoch(self) -> int:
        """Passes over the items completed so far."""
        return self._consumed_samples // (self.batches_per_epoch * self._global_batch)

    def next_batch(self) -> list[T]:
        """This rank's slice of the next global batch."""
        if self._order_epoch != self.epoch:
            self._order_epoch = self.epoch
            self._order = pass_order(self._portions, self._seed, self.epoch)
        per_epoch = self.batches_per_epoch * self._global_batch
        first = self._consumed_samples % per_epoch
        batch = [self._items[index] for index in self._order[first : first + self._global_batch]]
        self._consumed_samples += self._global_batch
        return own_share(batch, self._dp_rank, self._dp_size, self._cost)

    @property
    def num_left_over(self) -> int:
        """Items that each pass leaves out behind its last full batch."""
        return self._per_pass % self._global_batch

    @cached_property
    def digest(self) -> str:
        """The digest of the items that all ranks share."""
        return digest(self._items)

    def state(self) -> BatchesState:
        """What a checkpoint keeps."""
        return BatchesState(self._consumed_samples, len(self._items), self.digest)

    def restore(self, state: BatchesState) -> str | None:
        """Continue behind the samples that `state` counts.

        Returns:
            A warning where `state` does not say what the items were, as those of older checkpoints.

        Raises:
            DataError: the data has another number of items or other items, or the samples are no multiple of the
            global batch.
        """
        if state.num_items != len(self._items):
            raise DataError(
                f"the checkpoint was made with {state.num_items} items of data and there are "
                f"{len(self._items)}; resume with the data and the length limits of the first run"
            )
        consumed = state.consumed_samples
        if consumed % self._global_batch:
            raise DataError(
                f"the checkpoint has consumed {consumed} samples, no multiple of the global "
                f"batch of {self._global_batch}; resume with the batch size of the first run"
            )
        if state.digest not in (None, self.digest):
            raise DataError(
                f"the checkpoint was made with other data: {len(self._items)} items as now, but of other token ids, "
                "order, margins, verdicts or columns; put back file, tokenizer and chat template of the first run, or "
                "name another run.dir to start a new run"
            )
        self._consumed_samples = consumed
        if state.digest is not None:
            return None
        return "the checkpoint does not say what its data were, so it was not proved that these are the same"


class Fingerprinted[T](Sequence[T], ABC):
    """Examples that know what all ranks would otherwise find out one by one.

    Example:
        digest(examples) == examples.digest
    """

    @property
    @abstractmethod
    def digest(self) -> str:
        """What `digest` finds."""

    @property
    @abstractmethod
    def vocabulary(self) -> frozenset[int]:
        """Every id that stands in an example."""


def digest(examples: Sequence[Example]) -> str:
    """sha256 over token ids, margins, verdicts and columns of all examples in order; their names are not in it."""
    if isinstance(examples, Fingerprinted):
        return examples.digest
    return digest_of(examples)


def digest_of(examples: Iterable[Example]) -> str:
    """What `digest` finds, one example after another."""
    found = hashlib.sha256()
    for example in examples:
        sequences, number = _parts(example)
        found.update(array("d", (number, *map(len, sequences))))
        for ids in sequences:
            found.update(array("i", ids))
        if isinstance(example, Prompt) and example.columns:
            found.update(json.dumps(example.columns, sort_keys=True).encode())
    return found.hexdigest()


def _parts(example: Example) -> tuple[tuple[tuple[int, ...], ...], float]:
    match example:
        case Prompt():
            return (example.token_ids,), 0.0
        case Demonstration():
            stretches = (tuple(chain.from_iterable(example.skipped)),) if example.skipped else ()
            return (example.prompt_ids, example.response_ids, *stretches), 0.0
        case PreferencePair():
            return (example.prompt_ids, example.chosen_ids, example.rejected_ids), example.margin
        case JudgedResponse():
            texts = (example.prompt_ids, example.response_ids, example.unrelated_ids)
            return texts, float(example.is_desirable)
