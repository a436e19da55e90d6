import random

import pytest
import torch

from rto_megatron.data.cut import Layout
from rto_megatron.data.packing import (
    gather_to_grid,
    judged_microbatches,
    minibatches,
    pair_microbatches,
    response_mask,
    response_sums,
    rollout_batches,
    rollout_grid,
    scatter_to_positions,
    sequence_batches,
    supervised_microbatches,
    token_batch,
)
from rto_megatron.types import (
    WHOLE,
    Demonstration,
    Experience,
    JudgedResponse,
    PreferencePair,
    Rollout,
    TokenRewards,
)

CPU = torch.device("cpu")
LAYOUTS = [(True, 1), (True, 4), (False, 1), (False, 4)]


def random_ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randint(1, 99) for _ in range(count))


def make_rollouts(count: int) -> list[Rollout]:
    rng = random.Random(0)
    rollouts = []
    for index in range(count):
        response = random_ids(rng, rng.randint(1, 6))
        prompt = random_ids(rng, rng.randint(1, 5))
        rollouts.append(Rollout(str(index), prompt, response, (0.0,) * len(response), "stop", 0))
    return rollouts


def test_packed_batch_by_hand() -> None:
    batch = token_batch([((5, 6, 7), 1), ((8, 9), 1)], packed=True, multiple_of=4, device=CPU)
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert batch.targets_T.tolist() == [6, 7, 0, 9, 0, 0, 0, 0]
    assert batch.cu_seqlens == (0, 3, 5, 8)
    assert batch.num_rows == 1
    assert batch.last_positions == (2, 4)


def test_packed_batch_without_padding_has_no_extra_segment() -> None:
    batch = token_batch([((5, 6, 7), 1), ((8,), 1)], packed=True, multiple_of=4, device=CPU)
    assert batch.cu_seqlens == (0, 3, 4)
    assert batch.targets_T.tolist() == [6, 7, 0, 0]


def test_padded_batch_by_hand() -> None:
    batch = token_batch([((5, 6, 7), 1), ((8, 9, 1, 2, 3), 1)], packed=False, multiple_of=2, device=CPU)
    assert batch.tokens_T.tolist() == [5, 6, 7, 0, 0, 0, 8, 9, 1, 2, 3, 0]
    assert batch.targets_T.tolist() == [6, 7, 0, 0, 0, 0, 9, 1, 2, 3, 0, 0]
    assert batch.cu_seqlens == (0, 6, 12)
    assert batch.num_rows == 2
    assert batch.last_positions == (2, 10)


@pytest.mark.parametrize(("packed", "multiple_of"), LAYOUTS)
def test_every_response_value_sits_where_its_token_is_the_target(packed: bool, multiple_of: int) -> None:
    rollouts = make_rollouts(7)
    batch = token_batch(
        [(r.prompt_ids + r.response_ids, len(r.prompt_ids)) for r in rollouts], packed, multiple_of, CPU
    )
    width = max(len(r.response_ids) for r in rollouts)
    ids_BR = torch.tensor(
        [[*r.response_ids, *[777] * (width - len(r.response_ids))] for r in rollouts], dtype=torch.float32
    )
    lens = [len(r.prompt_ids) for r in rollouts], [len(r.response_ids) for r in rollouts]
    ids_T = scatter_to_positions(ids_BR, batch, *lens)
    occupied = ids_T != 0
    assert int(occupied.sum()) == sum(lens[1])
    assert torch.equal(ids_T[occupied].long(), batch.targets_T[occupied])
    mask_BR = response_mask(rollouts, CPU)
    assert torch.equal(gather_to_grid(ids_T, batch, *lens, width), ids_BR * mask_BR)


def test_positions_follow_the_definition() -> None:
    sequences = [(tuple(range(1, 8)), 3), (tuple(range(11, 15)), 1)]
    batch = token_batch(sequences, packed=True, multiple_of=1, device=CPU)
    grid_BR = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 0.0]])
    # o + p - 1 .. o + p + n - 2 is 2..5 for the first sequence and 7..9 for the second.
    expected = [0, 0, 1, 2, 3, 4, 0, 5, 6, 7, 0]
    assert scatter_to_positions(grid_BR, batch, [3, 1], [4, 3]).tolist() == expected
    assert batch.asked_N.tolist() == [2, 3, 4, 5, 7, 8, 9]


def test_gather_passes_gradients() -> None:
    batch = token_batch([((1, 2, 3), 1)], packed=True, multiple_of=4, device=CPU)
    values_T = torch.zeros(4, requires_grad=True)
    gather_to_grid(values_T, batch, [1], [2], 5).sum().backward()
    assert values_T.grad is not None
    assert values_T.grad.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(("packed", "multiple_of"), LAYOUTS)
@pytest.mark.parametrize(
    ("micro", "tokens"), [(1, None), (2, None), (3, None), (8, None), (None, 1), (None, 16)]
)
def test_rollout_grid_does_not_depend_on_layout(
    packed: bool, multiple_of: int, micro: int | None, tokens: int | None
) -> None:
    rollouts = make_rollouts(7)
    cut = rollout_batches(rollouts, Layout(micro, packed, multiple_of, CPU, tokens))
    grid_BR = rollout_grid([batch.targets_T.float() for batch in cut.batches], cut, rollouts)
    for row, rollout in zip(grid_BR.tolist(), rollouts, strict=True):
        assert row[: len(rollout.response_ids)] == list(rollout.response_ids)
        assert not any(row[len(rollout.response_ids) :])


@pytest.mark.parametrize(("packed", "multiple_of"), LAYOUTS)
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_supervised_weights_cover_response_targets(packed: bool, multiple_of: int, micro: int) -> None:
    demos = [
        Demonstration("a", (1, 2), (3, 4)),
        Demonstration("b", (5,), (6,)),
        Demonstration("c", (7, 8), (9,)),
    ]
    micros = supervised_microbatches(demos, 10, Layout(micro, packed, multiple_of, CPU))
    assert sum(len(m.batch.last_positions) for m in micros) == 3
    weighted = [t for m in micros for t in m.batch.targets_T[m.weight_T > 0].tolist()]
    assert weighted == [3, 4, 6, 9]
    assert sum(float(m.weight_T.sum()) for m in micros) == pytest.approx(4 / 10)


@pytest.mark.parametrize(("packed", "multiple_of"), LAYOUTS)
def test_stretches_of_a_response_that_are_not_learnt_have_no_weight(packed: bool, multiple_of: int) -> None:
    demos = [
        Demonstration("a", (1, 2), (3, 4, 5, 6, 7, 8), skipped=((1, 3), (4, 5))),
        Demonstration("b", (1,), (9, 10), skipped=((0, 1),)),
    ]
    (micro,) = supervised_microbatches(demos, 4, Layout(2, packed, multiple_of, CPU))
    assert micro.batch.targets_T[micro.weight_T > 0].tolist() == [3, 6, 8, 10]
    assert float(micro.weight_T.sum()) == pytest.approx(1)


@pytest.mark.parametrize(("packed", "multiple_of"), LAYOUTS)
@pytest.mark.parametrize(("micro", "tokens"), [(2, None), (None, 18)])
def test_pairs_stay_together_chosen_first(
    packed: bool, multiple_of: int, micro: int | None, tokens: int | None
) -> None:
    pairs = [
        PreferencePair(str(i), (10 + i,), (20 + i, 2), (30 + i, 31, 2), margin=float(i)) for i in range(3)
    ]
    logp_ref_G2 = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    layout = Layout(micro, packed, multiple_of, CPU, tokens)
    first, second = pair_microbatches(pairs, logp_ref_G2, 12, layout)
    assert first.batch.targets_T[first.mask_T > 0].tolist() == [20, 2, 21, 2, 30, 31, 2, 31, 31, 2]
    assert first.logp_ref_S.tolist() == [1, 3, 2, 4]
    assert second.logp_ref_S.tolist() == [5, 6]
    assert first.margin_P.tolist() == [0, 1]
    assert second.margin_P.tolist() == [2]
    assert first.weight_P.tolist() == pytest.approx([1 / 12, 1 / 12])
    assert first.batch.tokens_T[list(first.batch.last_positions)].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(("packed", "multiple_of"), LAYOUTS)
@pytest.mark.parametrize(("micro", "tokens"), [(1, None), (2, None), (4, None), (None, 1), (None, 14)])
def test_minibatch_fields_follow_their_rollout(
    packed: bool, multiple_of: int, micro: int | None, tokens: int | None
) -> None:
    rollouts = make_rollouts(6)
    mask_BR = response_mask(rollouts, CPU)
    fields_BR = torch.rand(7, *mask_BR.shape, generator=torch.Generator().manual_seed(0)) + 0.1
    rewards = TokenRewards(mask_BR, mask_BR, mask_BR, torch.tensor(0.0))
    weights_BR, logp_BR, logp_ref_BR, importance_BR, values_BR, advantages_BR, returns_BR = fields_BR
    experience = Experience(
        tuple(rollouts),
        mask_BR,
        logp_BR,
        logp_ref_BR,
        importance_BR,
        values_BR,
        advantages_BR,
        returns_BR,
        WHOLE,
        rewards,
    )
    layout = Layout(micro, packed, multiple_of, CPU, tokens)
    steps = minibatches(experience, weights_BR, [4, 1, 5], layout)
    groups = layout.groups_of([rollouts[row] for row in (4, 1, 5)])
    rows = [(4, 1, 5)[number] for group in groups for number in group]
    assert sorted(rows) == [1, 4, 5]
    occupied = [step.weight_T != 0 for step in steps]
    response_ids = [t for s, o in zip(steps, occupied, strict=True) for t in s.batch.targets_T[o].tolist()]
    assert response_ids == [t for row in rows for t in rollouts[row].response_ids]
    for name, grid_BR in (
        ("weight_T", weights_BR),
        ("logp_old_T", logp_BR),
        ("logp_ref_T", logp_ref_BR),
        ("pool_importance_T", importance_BR),
        ("values_old_T", values_BR),
        ("advantages_T", advantages_BR),
        ("returns_T", returns_BR),
    ):
        found = torch.cat([getattr(step, name)[o] for step, o in zip(steps, occupied, strict=True)])
        expected = torch.cat([grid_BR[row, : len(rollouts[row].response_ids)] for row in rows])
        assert torch.equal(found, expected), name
        assert all(
            float(getattr(step, name)[~o].abs().sum()) == 0 for step, o in zip(steps, occupied, strict=True)
        )


def test_response_mask_by_hand() -> None:
    rollouts = [Rollout("a", (1,), (2, 3), (0, 0), "stop", 0), Rollout("b", (1,), (2,), (0,), "stop", 0)]
    assert response_mask(rollouts, CPU).tolist() == [[1, 1], [1, 0]]


def test_verdicts_of_a_budget_follow_their_answers() -> None:
    answers = [
        JudgedResponse(str(i), (10 + i,) * (1 + i), (20 + i, 2), i % 2 == 0, (99, 98)) for i in range(4)
    ]
    layout = Layout(None, True, 1, CPU, tokens=9)  # lengths 3, 4, 5, 6
    first, second = judged_microbatches(answers, torch.arange(4.0), torch.tensor(0.0), 4, layout)
    for micro, numbers in ((first, [0, 3]), (second, [1, 2])):
        assert micro.logp_ref_S.tolist() == numbers
        assert micro.is_desirable_S.tolist() == [number % 2 == 0 for number in numbers]
        targets = [t for number in numbers for t in (20 + number, 2)]
        assert micro.batch.targets_T[micro.mask_T > 0].tolist() == targets


@pytest.mark.parametrize(("packed", "multiple_of"), LAYOUTS)
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_verdicts_follow_their_answers(packed: bool, multiple_of: int, micro: int) -> None:
    answers = [
        JudgedResponse(str(i), (10 + i,) * (1 + i % 3), (20 + i,) * (1 + i % 2) + (2,), i % 3 == 0, (99, 98))
        for i in range(5)
    ]
    logp_ref_G = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    baseline = torch.tensor(0.75)
    layout = Layout(micro, packed, multiple_of, CPU)
    micros = judged_microbatches(answers, logp_ref_G, baseline, 10, layout)
    assert [len(m.logp_ref_S) for m in micros] == [len(answers[i : i + micro]) for i in range(0, 5, micro)]
    targets = [t for m in micros for t in m.batch.targets_T[m.mask_T > 0].tolist()]
    assert targets == [t for a in answers for t in a.response_ids]
    assert torch.cat([m.logp_ref_S for m in micros]).tolist() == logp_ref_G.tolist()
    assert torch.cat([m.is_desirable_S for m in micros]).tolist() == [a.is_desirable for a in answers]
    assert torch.cat([m.weight_S for m in micros]).tolist() == pytest.approx([0.1] * 5)
    assert all(torch.equal(m.baseline, baseline) for m in micros)
    assert not {99, 98} & {t for m in micros for t in m.batch.tokens_T.tolist()}


@pytest.mark.parametrize(("packed", "multiple_of"), LAYOUTS)
@pytest.mark.parametrize("micro", [1, 2, 3, 8])
def test_response_sums_do_not_depend_on_the_layout(packed: bool, multiple_of: int, micro: int) -> None:
    sequences = [(r.prompt_ids + r.response_ids, len(r.prompt_ids)) for r in make_rollouts(7)]
    cut = sequence_batches(sequences, Layout(micro, packed, multiple_of, CPU))
    # The model's output is the token that a position predicts; garbage where there is none.
    values = [torch.where(b.targets_T > 0, b.targets_T.double(), 1e30).requires_grad_() for b in cut.batches]
    sums_S = response_sums(values, cut, sequences)
    assert sums_S.tolist() == [float(sum(ids[prompt_len:])) for ids, prompt_len in sequences]
    sums_S.sum().backward()
    counts = [int(v.grad.sum()) for v in values if v.grad is not None]
    assert sum(counts) == sum(len(ids) - prompt_len for ids, prompt_len in sequences)
