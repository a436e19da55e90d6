"""Dynamic sampling: batches are full of groups whose scores differ, the same on any number of replicas."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS
from ranks import run_ranks
from torch import Tensor
from trainer.test_options import exported, same
from trainer.tiny_runs import ENGINE_VOCAB, HeldPush, configure, join

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.data.batches import BatchesState
from rto_megatron.errors import UserError
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.arrivals import Hear
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.dynamic_sampler import DynamicSampler
from rto_megatron.trainer.online import train_online
from rto_megatron.trainer.parts import planned_parts
from rto_megatron.trainer.reward_source import RewardSource
from rto_megatron.types import Rollout

GROUP, NUM_GROUPS = 2, 4


class Deck:
    """Hands out groups in order: each draw the next `NUM_GROUPS` prompts, dealt to the replicas in turn."""

    def __init__(self, data_rank: int, data_size: int) -> None:
        self._data_rank = data_rank
        self._data_size = data_size
        self._next = 0

    def draw(self, step: int, hear: Hear | None = None) -> tuple[Rollout, ...]:
        """See `Sampler.draw`."""
        prompts = range(self._next + self._data_rank, self._next + NUM_GROUPS, self._data_size)
        self._next += NUM_GROUPS
        return tuple(
            Rollout(f"p{number}", (number,), (number, sibling), (-1.0, -1.0), "stop", step)
            for number in prompts
            for sibling in range(GROUP)
        )

    def push(self, version: int) -> dict[str, float]:
        """See `Sampler.push`."""
        return {}

    def state(self) -> BatchesState:
        """See `Sampler.state`."""
        return BatchesState(self._next, 100)

    def restore(self, state: BatchesState) -> None:
        """See `Sampler.restore`."""
        self._next = state.consumed_samples

    def close(self) -> None:
        """See `Sampler.close`."""


def _score(rollouts: Sequence[Rollout]) -> Tensor:
    """Responses differ to prompts whose number leaves 1, 2 or 5 when divided by 7."""
    return torch.tensor([r.response_ids[1] if r.prompt_ids[0] % 7 in (1, 2, 5) else 3.0 for r in rollouts])


def _draws(config: ReinforcementStage, limit: int) -> list[list[int]] | str:
    place = join(config)
    sampler = DynamicSampler(
        Deck(place.data_rank, place.data_size), config, limit, _score, place, lambda metrics: None
    )
    try:
        return [[r.prompt_ids[0] for r in sampler.draw(step)] for step in range(3)]
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("layout", ["one", "dp2"])
def test_the_first_prompts_whose_scores_differ_are_taken_on_any_number_of_replicas(
    layout: str, files: Path, tmp_path: Path
) -> None:
    keys = {"batch__rollout": NUM_GROUPS, "algorithm__samples_per_prompt": GROUP}
    config = configure("grpo", files, tmp_path / "run", layout, **keys)
    size = LAYOUTS[layout][0]
    found = run_ranks(size, _draws, config, 5)
    at = 0  # the slow way: prompt after prompt, but what is left of a round is not for the next step
    for step in range(3):
        taken: list[int] = []
        while len(taken) < NUM_GROUPS:
            taken += [number for number in range(at, at + NUM_GROUPS) if number % 7 in (1, 2, 5)]
            at += NUM_GROUPS
        for rank, draws in enumerate(found):
            assert draws[step] == [n for n in taken[:NUM_GROUPS][rank::size] for _ in range(GROUP)]


def test_no_full_batch_within_the_limit_is_an_error_on_every_rank(files: Path, tmp_path: Path) -> None:
    keys = {"batch__rollout": NUM_GROUPS, "algorithm__samples_per_prompt": GROUP}
    config = configure("grpo", files, tmp_path / "run", "dp2", **keys)
    said = run_ranks(2, _draws, config, 2)
    assert said[0] == said[1]
    assert "step 1: 3 of 4 prompts have responses whose scores differ" in said[0]
    assert "algorithm.max_sampling_rounds=2 rounds" in said[0]
    assert "nothing was trained on" in said[0] and "raise algorithm.max_sampling_rounds" in said[0]


class CoinReward:
    """0 or 1 by the first token: in half of the groups of two the scores differ; or always 1."""

    def __init__(self, is_constant: bool) -> None:
        self._is_constant = is_constant

    def scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        """See `RewardSource.scores`."""
        return torch.tensor([1.0 if self._is_constant else float(r.response_ids[0] % 2) for r in rollouts])


class TokenReward:
    """Pays the coin of `CoinReward` on the first token of a response."""

    def scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        """See `RewardSource.scores`."""
        grid_BR = torch.zeros(len(rollouts), max(len(r.response_ids) for r in rollouts))
        grid_BR[:, 0] = CoinReward(is_constant=False).scores(rollouts)
        return grid_BR


def _train(
    config: ReinforcementStage, is_constant: bool = False, reward: RewardSource | None = None
) -> str | None:
    place, engine = join(config), ScriptedEngine(ENGINE_VOCAB)
    parts = replace(planned_parts(), reward=reward or CoinReward(is_constant))
    try:
        train_online(config, place, ConnectedPool(engine, HeldPush(engine)), parts)
    except UserError as error:
        return str(error)
    return None


TWO_STEPS = {
    "run__steps": 2,
    "batch__train": 8,
    "batch__rollout": 4,
    "algorithm__samples_per_prompt": 2,
    "algorithm__max_sampling_rounds": 9,
}


def test_what_sources_pay_for_tokens_belongs_to_the_score_of_a_response(files: Path, tmp_path: Path) -> None:
    drawn = {}
    for name, reward in (("response", CoinReward(is_constant=False)), ("tokens", TokenReward())):
        config = configure("dapo", files, tmp_path / name, **TWO_STEPS)
        assert run_ranks(1, _train, config, reward=reward) == [None]
        drawn[name] = [
            [
                entry[f"rollout/{key}"]
                for key in ("sampling_rounds", "informative_fraction", "response_tokens")
            ]
            for entry in read_metrics(tmp_path / name)
        ]
    assert drawn["tokens"] == drawn["response"]


def test_a_run_samples_until_its_batches_are_full_and_resumes_exactly(files: Path, tmp_path: Path) -> None:
    keys = {
        **TWO_STEPS,
        "run__save_every": 1,
        "algorithm__truncated": "compat",
        "optimizer__warmup_fraction": 0.0,
    }
    whole = configure("dapo", files, tmp_path / "whole", **keys)
    assert run_ranks(1, _train, whole) == [None]
    entries = read_metrics(tmp_path / "whole")
    assert max(entry["rollout/sampling_rounds"] for entry in entries) > 1
    for entry in entries:
        assert 0 < entry["rollout/informative_fraction"] <= 1
        assert entry["objective/scores"] == 0.5  # each group of two holds a 0 and a 1
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step_000002")
    (tmp_path / "resumed/checkpoints/latest").unlink()
    shutil.rmtree(tmp_path / "resumed/hf")
    resumed = configure("dapo", files, tmp_path / "resumed", **keys)
    assert run_ranks(1, _train, resumed) == [None]
    assert same(exported(tmp_path / "whole/hf"), exported(tmp_path / "resumed/hf"))
    constant = configure("dapo", files, tmp_path / "constant", **keys)
    (said,) = run_ranks(1, _train, constant, True)
    assert said is not None and "step 1: 0 of 4 prompts have responses whose scores differ" in said
    assert not (tmp_path / "constant/checkpoints").exists()
    other = configure(
        "dapo", files, tmp_path / "whole", **{**keys, "run__steps": 3, "algorithm__dual_clip": 3.0}
    )
    (said,) = run_ranks(1, _train, other)
    assert said is not None and "algorithm.dual_clip: None in the checkpoint, 3.0" in said
