from dataclasses import replace

import pytest

from rto_megatron.data.batches import Batches, BatchesState, digest
from rto_megatron.errors import DataError, RecipeError
from rto_megatron.types import Demonstration, Example, JudgedResponse, PreferencePair, Prompt

ITEMS = [Prompt(f"prompt {number}", (number,)) for number in range(23)]


def global_batches(dp_size: int, steps: int, seed: int = 3) -> list[list[Prompt]]:
    ranks = [Batches(ITEMS, 6, seed, rank, dp_size) for rank in range(dp_size)]
    steps_of_ranks = ([rank.next_batch() for rank in ranks] for _ in range(steps))
    return [[item for row in zip(*slices, strict=True) for item in row] for slices in steps_of_ranks]


@pytest.mark.parametrize("dp_size", [2, 3, 6])
def test_global_batches_do_not_depend_on_data_parallel_size(dp_size: int) -> None:
    assert global_batches(dp_size, 8) == global_batches(1, 8)


def test_minibatches_cut_in_order_do_not_depend_on_data_parallel_size() -> None:
    (whole,) = global_batches(1, 1)
    ranks = [Batches(ITEMS, 6, 3, rank, 2).next_batch() for rank in range(2)]
    for first, width in ((0, 1), (1, 2)):
        cut = {item for rank in ranks for item in rank[first : first + width]}
        assert cut == set(whole[2 * first : 2 * (first + width)])


def test_an_epoch_shows_no_item_twice_and_drops_the_tail() -> None:
    batches = Batches(ITEMS, 6, seed=0)
    assert batches.batches_per_epoch == 3
    seen = [item for _ in range(3) for item in batches.next_batch()]
    assert len(set(seen)) == 18
    assert batches.epoch == 1
    assert len({item for _ in range(3) for item in batches.next_batch()}) == 18


def test_epochs_and_seeds_have_their_own_order() -> None:
    steps = global_batches(1, 6)
    assert steps[:3] != steps[3:]
    assert steps != global_batches(1, 6, seed=4)


@pytest.mark.parametrize("step", range(8))
def test_restored_loader_continues(step: int) -> None:
    walked = Batches(ITEMS, 6, seed=3, dp_rank=1, dp_size=2)
    for _ in range(step):
        walked.next_batch()
    restored = Batches(ITEMS, 6, seed=3, dp_rank=1, dp_size=2)
    restored.restore(walked.state())
    assert [restored.next_batch() for _ in range(5)] == [walked.next_batch() for _ in range(5)]


def test_state_counts_samples_of_all_ranks() -> None:
    batches = Batches(ITEMS, 6, seed=3, dp_rank=1, dp_size=2)
    batches.next_batch()
    state = batches.state()
    assert (state.consumed_samples, state.num_items) == (6, 23)


def test_restore_moves_back_too() -> None:
    batches = Batches(ITEMS, 6, seed=3)
    start = batches.state()
    first = [batches.next_batch() for _ in range(4)]
    batches.restore(start)
    assert [batches.next_batch() for _ in range(4)] == first


def test_fewer_items_than_a_batch_is_an_error() -> None:
    with pytest.raises(DataError, match="5 items, fewer than one global batch of 6"):
        Batches(ITEMS[:5], 6, seed=0)


def test_ranks_that_do_not_divide_the_batch_are_an_error() -> None:
    with pytest.raises(RecipeError, match=r"4 data-parallel ranks do not divide .* 6; use 4 or 8"):
        Batches(ITEMS, 6, seed=0, dp_rank=0, dp_size=4)


def test_restoring_with_other_data_or_batch_is_an_error() -> None:
    batches = Batches(ITEMS, 6, seed=0)
    with pytest.raises(DataError, match="22 items of data and there are 23"):
        batches.restore(BatchesState(6, 22))
    with pytest.raises(DataError, match="no multiple of the global batch"):
        batches.restore(BatchesState(8, 23))


DEMONSTRATION = Demonstration("a", (1, 2), (3, 4, 5))
JUDGED = JudgedResponse("a", (1,), (2, 3), True, (4, 5))
PAIR = PreferencePair("a", (1,), (2, 3), (4, 5), margin=0.5)
PROMPT = Prompt("a", (1, 2), {"answer": "4"})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PROMPT, replace(PROMPT, columns={"answer": "5"})),
        (DEMONSTRATION, replace(DEMONSTRATION, skipped=((1, 2),))),
        (DEMONSTRATION, replace(DEMONSTRATION, prompt_ids=(1, 2, 3), response_ids=(4, 5))),
        (PAIR, replace(PAIR, margin=0.25)),
        (PAIR, replace(PAIR, chosen_ids=PAIR.rejected_ids, rejected_ids=PAIR.chosen_ids)),
        (JUDGED, replace(JUDGED, is_desirable=False)),
        (JUDGED, replace(JUDGED, unrelated_ids=(4, 6))),
    ],
)
def test_a_digest_tells_apart_what_trains_differently(one: Example, other: Example) -> None:
    assert digest([one]) != digest([other])
    assert digest([one, other]) != digest([other, one])
    assert digest([one]) == digest([replace(one, id="b")])
