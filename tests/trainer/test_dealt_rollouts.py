"""Replicas score whole groups of about equal cost, and share every optimizer step so; nothing is done twice or left."""

from collections import Counter
from itertools import batched
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from trainer.tiny_runs import configure, join

from rto_megatron.algorithms.ppo import Config
from rto_megatron.models.model_flops import forward_flops
from rto_megatron.trainer.dealt_rollouts import deal_rollouts
from rto_megatron.trainer.setup import prepare_stage
from rto_megatron.trainer.update import optimizer_minibatches
from rto_megatron.types import Distribution, Rollout, TrainingRows

GROUP, NUM_GROUPS = 2, 8
# Those of even numbers, which the first replica samples, are ten times as long.
ALL = tuple(
    Rollout(f"p{g}", (5, 6), tuple(range(7, 7 + (2 + g + s) * (10 if g % 2 == 0 else 1))), (), "stop", 0)
    for g in range(NUM_GROUPS)
    for s in range(GROUP)
)


def _shares(
    files: Path, run_dir: Path
) -> tuple[tuple[Rollout, ...], tuple[Rollout, ...], list[list[str]], list[float]]:
    config = configure("grpo", files, run_dir, "dp2", batch={"train": 8, "rollout": 8, "tokens": 200})
    place = join(config)
    setup = prepare_stage(config, place)
    assert setup.cost is not None
    sampled = [r for group in list(batched(ALL, GROUP))[place.data_rank :: 2] for r in group]
    dealt = deal_rollouts(sampled, GROUP, setup, step=1)
    grid_BR = torch.ones(len(ALL), max(len(r.response_ids) for r in ALL))
    rows = TrainingRows(dealt.everyone, *[grid_BR] * 7, Distribution())
    names, costs = [], []
    algorithm = Config(epochs=2)
    for step in optimizer_minibatches(rows, algorithm, 90, 2, place, setup.layout, 1, setup.cost):
        names.append([name for group in step.names for name in group])
        lengths = [
            last + 1 - start
            for micro in step.microbatches
            for start, last in zip(micro.batch.cu_seqlens, micro.batch.last_positions, strict=False)
        ]
        costs.append(forward_flops(setup.sources["policy"].shape(), False, lengths))
    return dealt.everyone, dealt.own, names, costs


def test_groups_stay_whole_and_replicas_have_about_as_much_to_do(files: Path, tmp_path: Path) -> None:
    (everyone, first, first_names, first_costs), (other_all, second, second_names, second_costs) = run_ranks(
        2, _shares, files, tmp_path
    )
    assert everyone == other_all == ALL
    assert sorted((*first, *second), key=ALL.index) == list(ALL)
    for own in (first, second):
        assert all(count == GROUP for count in Counter(r.prompt_id for r in own).values())
        assert list(own) == sorted(own, key=ALL.index)
    tokens = [sum(len(r.response_ids) for r in own) for own in (first, second)]
    assert max(tokens) / (sum(tokens) / 2) < 1.05
    assert len(first_names) == len(second_names) == 4  # two passes of two steps
    for step, (one, other) in enumerate(zip(first_names, second_names, strict=True)):
        assert len(one) + len(other) == len(ALL) // 2
        if step < 2:  # the first pass goes by the order of the prompts
            want = [r.prompt_id for r in ALL[step * 8 : step * 8 + 8]]
            assert sorted((*one, *other)) == sorted(want)
    for pair in zip(first_costs, second_costs, strict=True):
        assert max(pair) / (sum(pair) / 2) < 1.25
    both = Counter(name for names in (first_names[2:], second_names[2:]) for step in names for name in step)
    assert set(both.values()) == {GROUP}


@pytest.mark.parametrize("how", [{"micro": 2}, {"tokens": 200}])
def test_a_lone_replica_keeps_what_it_sampled(how: dict[str, int], files: Path, tmp_path: Path) -> None:
    config = configure("grpo", files, tmp_path, batch={"train": 8, "rollout": 8, **how})

    def own() -> tuple[Rollout, ...]:
        return deal_rollouts(ALL, GROUP, prepare_stage(config, join(config)), step=1).own

    assert run_ranks(1, own) == [ALL]
