"""Micro-batches within a budget, and shares of equal cost."""

import random
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from rto_megatron.data.batches import Batches
from rto_megatron.data.budget import budget_fill
from rto_megatron.data.cut import Layout
from rto_megatron.data.grouping import deal, own_share, read_lengths
from rto_megatron.data.packing import token_batch
from rto_megatron.types import JudgedResponse, Prompt

CPU = torch.device("cpu")


def _layout(tokens: int, packed: bool = True, multiple_of: int = 1) -> Layout:
    return Layout(None, packed, multiple_of, CPU, tokens)


def _positions(lengths: list[int], packed: bool, multiple_of: int) -> int:
    """What `token_batch` lays out, by its definition."""
    rows = [sum(lengths)] if packed else [max(lengths) for _ in lengths]
    return sum(-(-row // multiple_of) * multiple_of for row in rows)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_a_micro_batch_is_within_the_budget_and_holds_each_item_once(packed: bool, multiple_of: int) -> None:
    draw = random.Random(1)
    items = [tuple(draw.randint(1, 300) for _ in range(draw.choice((1, 2)))) for _ in range(200)]
    groups = _layout(640, packed, multiple_of).groups(items)
    assert sorted(number for group in groups for number in group) == list(range(200))
    for group in groups:
        assert group == sorted(group)
        together = [length for number in group for length in items[number]]
        assert _positions(together, packed, multiple_of) <= 640
    # No two of them would have fitted into one.
    for one, other in combinations(groups, 2):
        together = [length for number in (*one, *other) for length in items[number]]
        assert _positions(together, packed, multiple_of) > 640


def test_first_fit_by_hand() -> None:
    # 7 | 6 | 5 into the first with room for it: none; 4 beside 6; 3 beside 7; 2 beside 5; 2 beside it again.
    assert _layout(10).groups([(2,), (3,), (4,), (5,), (6,), (7,), (2,)]) == [[1, 5], [2, 4], [0, 3, 6]]


def test_items_of_a_prompt_stay_together_as_far_as_they_have_room() -> None:
    items, prompts = [(2,), (3,), (4,), (4,), (6,), (3,)], "ababba"
    assert _layout(10).groups(items, prompts) == _layout(10).groups(items)
    # Bundles: a has 2 + 4 + 3, b has 3 + 4 and, as that leaves no room for 6, another one.
    together = replace(_layout(10), shares_prompts=True).groups(items, prompts)
    assert together == [[0, 2, 5], [1, 3], [4]]


def test_an_item_that_is_longer_than_the_budget_is_alone() -> None:
    assert _layout(10).groups([(3,), (11,), (4,), (6, 6)]) == [[3], [1], [0, 2]]


def test_shares_cost_about_the_same_and_leave_no_replica_idle() -> None:
    draw = random.Random(2)
    costs = [draw.lognormvariate(8, 0.9) for _ in range(512)]
    shares = deal(costs, 8)
    assert sorted(number for share in shares for number in share) == list(range(512))
    sums = [sum(costs[number] for number in share) for share in shares]
    assert max(sums) / (sum(sums) / 8) < 1.01
    # As they come, a replica has a tenth more to do than the others.
    dealt = [sum(costs[number] for number in range(rank, 512, 8)) for rank in range(8)]
    assert max(dealt) / (sum(dealt) / 8) > 1.1
    assert deal([1.0, 1.0, 1.0], 3) == [[0], [1], [2]]


def test_ties_are_dealt_by_number() -> None:
    assert deal([5.0, 5.0, 3.0, 3.0], 2) == [[0, 2], [1, 3]]
    assert deal([1.0, 5.0, 2.0, 2.0], 2) == [[1], [0, 2, 3]]


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_replicas_share_every_global_batch_by_cost_and_its_members_stay_the_same(num_replicas: int) -> None:
    items = [Prompt(str(number), (1,) * (1 + number * number)) for number in range(16)]
    alone = Batches(items, 5, seed=3)
    walks = [
        Batches(items, 5, 3, rank, num_replicas, lambda p: len(p.token_ids)) for rank in range(num_replicas)
    ]
    for _ in range(7):
        shares = [walk.next_batch() for walk in walks]
        assert all(shares)
        batch = alone.next_batch()
        whole = {prompt.id for prompt in batch}
        assert {prompt.id for share in shares for prompt in share} == whole
        assert sum(map(len, shares)) == len(whole)
        # The last item that a share was given went to the one that had least.
        loads = [sum(len(prompt.token_ids) for prompt in share) for share in shares]
        assert max(loads) - min(loads) <= max(len(prompt.token_ids) for prompt in batch)


def test_without_costs_replicas_take_turns() -> None:
    assert own_share([1, 2, 3, 4, 5], 1, 2, None) == [2, 4]


def test_a_verdict_costs_its_answer_twice_and_the_unrelated_one_once() -> None:
    answer = JudgedResponse("a", (1, 2, 3), (4, 5), True, (6, 7, 8, 9))
    assert read_lengths(answer) == (5, 5, 7)


@pytest.mark.parametrize("packed", [True, False])
def test_the_fill_of_a_budget_leaves_padding_out(packed: bool) -> None:
    batches = [
        token_batch([([5] * length, 1) for length in lengths], packed, 8, CPU) for lengths in ((5, 6), (3,))
    ]
    assert budget_fill(batches, _layout(20, packed, 8)) == {"memory/budget_fill_fraction": (14.0, 40.0)}
    assert budget_fill(batches, Layout(2, packed, 8, CPU)) == {}
