"""Finds the prompts that sequences of a micro-batch share, and lays out the row in which each stands once."""

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
    firsts = _first_with_the_prompt(sequences)
    repeated = [p for number, (_, p) in enumerate(sequences) if firsts[number] != number]
    if sum(repeated) < _LEAST_SPARED * sum(len(ids) for ids, _ in sequences):
        return None
    is_shared = {first for number, first in enumerate(firsts) if first != number}
    runs: list[int] = []
    order: list[int] = []
    prompt_runs: dict[int, int] = {}  # of the sequence that has it first -> its run
    starts: list[int] = []  # of each sequence's prompt in the row
    added, tokens, places, read = [0], list[int](), list[int](), list[int]()
    for number, (ids, prompt_len) in enumerate(sequences):
        first, row_len = firsts[number], len(tokens)
        own = prompt_len if first != number else 0  # the first token that it adds
        starts.append(starts[first] if own else row_len)
        if number in is_shared:
            prompt_runs[number] = len(runs)
            order.append(len(runs))
            runs.append(prompt_len)
        elif own:
            order.append(prompt_runs[first])
        response_from = prompt_len if own or number in is_shared else 0
        order.append(len(runs))
        runs.append(len(ids) - response_from)
        tokens += ids[own:]
        places += range(own, len(ids))
        read += chain(range(starts[number], starts[number] + own), range(row_len, len(tokens)))
        added.append(len(tokens))
    seen = [0, *accumulate(len(ids) for ids, _ in sequences)]
    if num_padding := -len(tokens) % multiple_of:
        order.append(len(runs))
        runs.append(num_padding)
        tokens += [padding_id] * num_padding
        places += range(num_padding)
        added.append(len(tokens))
        seen.append(seen[-1] + num_padding)
    read += [0] * (num_positions - len(read))
    tokens_K, places_K, read_T = (
        copied_to(torch.tensor(numbers, dtype=torch.int64), device) for numbers in (tokens, places, read)
    )
    return SharedRow(
        tokens_K, places_K, read_T, tuple(added), tuple(runs), tuple(order), tuple(seen), tuple(repeated)
    )


def _first_with_the_prompt(sequences: Sequence[tuple[Sequence[int], int]]) -> list[int]:
    """Of each sequence the number of the first one with its prompt; its own where it has nothing behind the prompt."""
    known: dict[tuple[int, ...], int] = {}
    return [
        known.setdefault(tuple(ids[:prompt_len]), number) if len(ids) > prompt_len else number
        for number, (ids, prompt_len) in enumerate(sequences)
    ]
