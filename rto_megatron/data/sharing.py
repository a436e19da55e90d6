"""Finds the prompts that sequences of a micro-batch share, and lays out the row in which each stands once."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, chain

import torch

from rto_megatron.platform.copies import copied_to
from rto_megatron.shared_row import SharedRow

# The keys and values of a shared prompt are copied for each of its responses in every layer, which is worth it for what
# spares a part of the products: at a sixteenth both are small.
_LEAST_SPARED = 1 / 16


def shared_row(
    sequences: Sequence[tuple[Sequence[int], int]],
    num_positions: int,
    multiple_of: int,
    padding_id: int,
    device: torch.device,
) -> SharedRow | None:
    """The row of some sequences with every prompt once; None where that spares next to nothing.

    Args:
        sequences: (token ids, prompt length in tokens) of each sequence.
        num_positions: T of the micro-batch, whose row has the sequences one behind the other, and padding.
        multiple_of: the length of the row is rounded up to it, by one trailing padding sequence.
        device: where the tensors go.
    """
    # A sequence that is a prompt alone would add nothing to the row.
    prompts = [tuple(ids[:length]) if len(ids) > length else None for ids, length in sequences]
    counts = Counter(prompt for prompt in prompts if prompt is not None)
    num_spared = sum(len(prompt) * (count - 1) for prompt, count in counts.items())
    lengths = [len(ids) for ids, _ in sequences]
    if num_spared < _LEAST_SPARED * sum(lengths):
        return None
    row, known, repeated = _Row(), dict[tuple[int, ...], int](), list[int]()
    order, read, added = list[int](), list[int](), [0]
    for (ids, _), prompt in zip(sequences, prompts, strict=True):
        if prompt is None or counts[prompt] == 1:
            runs = [row.add(ids, 0)]
        else:
            if prompt in known:
                repeated.append(len(prompt))
            else:
                known[prompt] = row.add(prompt, 0)
            runs = [known[prompt], row.add(ids[len(prompt) :], len(prompt))]
        order += runs
        read += chain.from_iterable(map(row.positions, runs))
        added.append(len(row.tokens))
    if num_padding := -len(row.tokens) % multiple_of:
        order.append(row.add([padding_id] * num_padding, 0))
        added.append(len(row.tokens))
        lengths.append(num_padding)
    read += [0] * (num_positions - len(read))
    tokens_K, places_K, read_T = (
        copied_to(torch.tensor(numbers, dtype=torch.int64), device)
        for numbers in (row.tokens, row.places, read)
    )
    seen = (0, *accumulate(lengths))
    return SharedRow(
        tokens_K, places_K, read_T, tuple(added), tuple(row.runs), tuple(order), seen, tuple(repeated)
    )


class _Row:
    """The tokens of a row, run by run."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.places: list[int] = []
        self.runs: list[int] = []  # their lengths
        self._starts: list[int] = []

    def add(self, ids: Sequence[int], place: int) -> int:
        """The number of a new run, whose first token has this place in its sequence."""
        self._starts.append(len(self.tokens))
        self.runs.append(len(ids))
        self.tokens += ids
        self.places += range(place, place + len(ids))
        return len(self.runs) - 1

    def positions(self, number: int) -> range:
        """Where a run lies."""
        start = self._starts[number]
        return range(start, start + self.runs[number])
