"""How sequences are cut into micro-batches, by their number or by their tokens, and put back into their order."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from rto_megatron.data.grouping import Extent, Lengths, bundled, first_fit, in_turn, lengths_of
from rto_megatron.types import (
    Demonstration,
    Example,
    JudgedResponse,
    PreferencePair,
    Prompt,
    Rollout,
    TokenBatch,
)


@dataclass(frozen=True)
class Layout:
    """How sequences become micro-batches on one rank: by their number, or by their tokens.

    Example:
        Layout(micro=4, packed=True, multiple_of=8, device=torch.device("cuda", 0))
        Layout(micro=None, packed=True, multiple_of=8, device=torch.device("cuda", 0), tokens=16384)
    """

    micro: int | None  # sequences, or pairs, per micro-batch; the last micro-batch may hold fewer
    packed: bool  # one packed row; otherwise right-padded rows
    # Row lengths are a multiple of this; sequence parallelism needs the tensor-parallel size.
    multiple_of: int
    device: torch.device
    tokens: int | None = None  # per micro-batch, padding included, where `micro` is None
    shares_prompts: bool = False  # models compute equal prompts of a packed row once

    def size(self, extent: Extent) -> int:
        """The positions of a micro-batch of such sequences."""
        row, num_rows = (extent.num_tokens, 1) if self.packed else (extent.longest, extent.num_sequences)
        return num_rows * (row + -row % self.multiple_of)

    def groups(self, items: Sequence[Lengths], prompts: Sequence[Hashable] | None = None) -> list[list[int]]:
        """Numbers of the items of each micro-batch; the sequences of an item stay together.

        Args:
            prompts: of each item; those with one had better stay together where it is computed once. None: no two
                items have one.
        """
        if self.tokens is None:
            assert self.micro is not None, "one of both says how"
            return in_turn(len(items), self.micro)
        if prompts is None or not self.shares_prompts:
            return first_fit(items, self.tokens, self.size)
        bundles = bundled(items, prompts, self.tokens, self.size)
        held = [tuple(chain.from_iterable(items[number] for number in bundle)) for bundle in bundles]
        return [
            sorted(chain.from_iterable(bundles[number] for number in group))
            for group in first_fit(held, self.tokens, self.size)
        ]

    def groups_of(self, examples: Sequence[Example | Rollout]) -> list[list[int]]:
        """Numbers of the examples of each micro-batch in training."""
        lengths = [lengths_of(example) for example in examples]
        return self.groups(lengths, [_answered(example) or n for n, example in enumerate(examples)])

    @property
    def for_pairs(self) -> "Layout":
        """Of the two sequences of each pair, one behind the other, in micro-batches that hold as many pairs."""
        return self if self.micro is None else replace(self, micro=2 * self.micro)


def _answered(example: Example | Rollout) -> tuple[int, ...] | None:
    """The prompt of an example whose prompt has other answers; None: what it begins with means nothing."""
    match example:
        case PreferencePair() | JudgedResponse() | Rollout():
            return example.prompt_ids
        case Prompt() | Demonstration():
            return None


@dataclass(frozen=True)
class CutSequences:
    """Sequences as micro-batches for a forward, and the way back to their order.

    Example:
        cut = sequence_batches(sequences, layout)
        scores = cut.in_order([values_T[list(b.last_positions)] for values_T, b in zip(values, cut.batches)])
    """

    batches: list[TokenBatch]
    groups: list[list[int]]  # of each batch, the numbers of its sequences

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows in the order of the sequences, where each batch gave one for each of its own."""
        rows = torch.cat(list(parts))
        numbers = list(chain.from_iterable(self.groups))
        assert len(rows) == len(numbers)
        if numbers == list(range(len(numbers))):
            return rows
        places = torch.tensor(numbers, device=rows.device).argsort()
        return rows[places]
