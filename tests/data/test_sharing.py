"""The row in which every prompt stands once, by the definition of what a position of the micro-batch is."""

import random

import pytest
import torch

from rto_megatron.data.packing import token_batch

CPU = torch.device("cpu")


def _sequences(seed: int) -> list[tuple[list[int], int]]:
    """Of a few prompts, with responses of any length, some without any."""
    draw = random.Random(seed)
    prompts = [[draw.randint(1, 9) for _ in range(draw.randint(4, 12))] for _ in range(3)]
    chosen = [draw.choice(prompts) for _ in range(draw.randint(6, 9))]
    return [(p + [draw.randint(1, 9) for _ in range(draw.randint(0, 6))], len(p)) for p in chosen]


@pytest.mark.parametrize("multiple_of", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_every_position_is_computed_once_with_what_stands_before_it(seed: int, multiple_of: int) -> None:
    sequences = _sequences(seed)
    batch = token_batch(sequences, True, multiple_of, CPU, shares_prompts=True)
    shared = batch.shared
    assert shared is not None and len(shared.tokens_K) % multiple_of == 0
    num_real = sum(len(ids) for ids, _ in sequences)
    want = {tuple(ids[:p]) for ids, p in sequences if len(ids) > p}
    num_computed = sum(len(ids) - (p if len(ids) > p else 0) for ids, p in sequences) + sum(map(len, want))
    assert -(-num_computed // multiple_of) * multiple_of == len(shared.tokens_K)
    assert num_real - sum(shared.repeated) == num_computed
    # What the keys of a sequence are put together from are its tokens, at their places.
    for values, of_sequence in (
        (shared.tokens_K, lambda ids: ids),
        (shared.places_K, lambda ids: range(len(ids))),
    ):
        runs = values.split(shared.runs)
        seen = torch.cat([runs[number] for number in shared.order]).tolist()
        assert seen[:num_real] == [value for ids, _ in sequences for value in of_sequence(ids)]
        assert values[shared.read_T][:num_real].tolist() == seen[:num_real]
    lengths = [len(ids) for ids, _ in sequences]
    assert [end - start for start, end in zip(shared.seen, shared.seen[1:], strict=False)][
        : len(lengths)
    ] == lengths
    # A sequence's last queries are the last positions that it reads.
    for number, (start, end) in enumerate(zip(shared.added, shared.added[1:], strict=False)):
        if number < len(lengths):
            stop = batch.last_positions[number] + 1
            assert shared.read_T[stop - (end - start) : stop].tolist() == list(range(start, end))


def test_a_row_with_little_to_share_is_left_as_it_is() -> None:
    sequences = [([1, *range(40)], 1), ([1, *range(30)], 1)]
    assert token_batch(sequences, True, 1, CPU, shares_prompts=True).shared is None
    assert token_batch(_sequences(1), True, 1, CPU).shared is None
