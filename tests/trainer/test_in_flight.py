"""What is in flight while the trainer works: sampled beside the scoring, and waited for by pushes and evaluations."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_ranks
from trainer.tiny_runs import AHEAD, ENGINE_VOCAB, HeldPush, ages, configure, join

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.generation.contract import Sampling
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.ahead import AheadSampler
from rto_megatron.trainer.arrivals import Hear
from rto_megatron.trainer.checked_scores import Scorer
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.online import train_online
from rto_megatron.trainer.parts import planned_parts
from rto_megatron.types import Prompt, Rollout, ScoredRollouts


class Meeting:
    """The engine waits until the step before the one that its batch is for is being scored, and the scorer for it."""

    def __init__(self) -> None:
        self.scoring = [threading.Event() for _ in range(3)]
        self.sampling = [threading.Event() for _ in range(3)]


MEETING = Meeting()


class MeetingEngine(ScriptedEngine):
    """See `Meeting`."""

    def __init__(self) -> None:
        super().__init__(ENGINE_VOCAB)
        self._number = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        number, self._number = self._number, self._number + 1
        if number:
            MEETING.sampling[number - 1].set()
            assert MEETING.scoring[number - 1].wait(60)
        return super().generate(prompts, sampling, version)


class MeetingScorer(Scorer):
    """See `Meeting`."""

    def score(self, sampled: Sequence[Rollout], step: int) -> ScoredRollouts:
        """See `Scorer.score`."""
        MEETING.scoring[step - 1].set()
        assert step == 3 or MEETING.sampling[step - 1].wait(60)
        return super().score(sampled, step)


def _meet(config: ReinforcementStage) -> None:
    engine = MeetingEngine()
    parts = replace(planned_parts(), scorer=MeetingScorer)
    train_online(config, join(config), ConnectedPool(engine, HeldPush(engine)), parts)


def test_the_pool_samples_while_the_trainer_scores(files: Path, tmp_path: Path) -> None:
    config = configure("reinforce_pp", files, tmp_path, run__steps=3, run__save_every=None, **AHEAD)
    run_ranks(1, _meet, config)
    entries = read_metrics(tmp_path)
    assert ages(tmp_path) == [0, 1, 1]
    # With the weights of a step before, the gap to the pool says nothing about the pool.
    assert ["pool/logprob_gap_alarm" in entry for entry in entries] == [True, False, False]
    for entry in entries:
        assert entry["time/step_s"] > entry["time/pool_wait_s"] >= 0
        assert entry["time/samples_per_s"] == pytest.approx(8 / entry["time/step_s"])


class HeldEngine(ScriptedEngine):
    """Answers what it was asked ahead once `ReleasingSampler` says that it waits for it."""

    def __init__(self) -> None:
        super().__init__(ENGINE_VOCAB)
        self.begun, self.released = threading.Event(), threading.Event()
        self.num_in_flight = 0
        self._is_first = True

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        is_ahead = threading.current_thread() is not threading.main_thread() and not self._is_first
        self._is_first = False
        if is_ahead:
            self.num_in_flight += 1
            self.begun.set()
            assert self.released.wait(60)
            self.num_in_flight -= 1
        return super().generate(prompts, sampling, version)


class ReleasingSampler(AheadSampler):
    """See `HeldEngine`."""

    def push(self, version: int) -> dict[str, float]:
        """See `Sampler.push`."""
        engine = self._engine
        assert isinstance(engine, HeldEngine)
        engine.released.set()
        pushed = super().push(version)
        engine.released.clear()
        return pushed


class LonelyPush(HeldPush):
    """A push that pauses servers: nothing may be in flight."""

    def __init__(self, engine: HeldEngine) -> None:
        super().__init__(engine)
        self._held = engine

    def __call__(self, version: int) -> dict[str, float]:
        if version:
            assert self._held.begun.wait(60)  # the batch that was asked for in the step before
        assert self._held.num_in_flight == 0
        return super().__call__(version)


class LateReplica(HeldEngine):
    """Stays in flight when its sampler waits for it: until the first replica pushes, or for a second."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        if self._is_first:
            return super().generate(prompts, sampling, version)
        (self._folder / "in_flight").touch()
        drawn = super().generate(prompts, sampling, version)
        end = time.monotonic() + 1
        while time.monotonic() < end and not (self._folder / "pushed").exists():
            time.sleep(0.01)
        (self._folder / "in_flight").unlink()
        return drawn


class LateSampler(AheadSampler):
    """See `LateReplica`."""

    def begin(self, step: int, hear: Hear | None = None) -> dict[str, float]:
        """See `Sampler.begin`."""
        assert isinstance(self._engine, LateReplica)
        if step:
            self._engine.released.set()
        return super().begin(step, hear)


class WatchingPush(HeldPush):
    """Nothing of another replica is in flight."""

    def __init__(self, engine: ScriptedEngine, folder: Path) -> None:
        super().__init__(engine)
        self._folder = folder

    def __call__(self, version: int) -> dict[str, float]:
        if version:
            (self._folder / "pushed").touch()
            assert not (self._folder / "in_flight").exists()
        return super().__call__(version)


def _push_beside_another(config: ReinforcementStage) -> None:
    place, folder = join(config), config.run.dir.parent
    if place.rank == 0:
        engine: ScriptedEngine = ScriptedEngine(ENGINE_VOCAB)
        pool, sampler = ConnectedPool(engine, WatchingPush(engine, folder)), AheadSampler
    else:
        engine = LateReplica(folder)
        pool, sampler = ConnectedPool(engine, HeldPush(engine)), LateSampler
    train_online(config, place, pool, replace(planned_parts(), sampler=sampler))


def test_a_push_waits_for_the_requests_of_all_replicas(files: Path, tmp_path: Path) -> None:
    steps = {"run__steps": 2, "run__save_every": None}
    run_ranks(
        2, _push_beside_another, configure("reinforce_pp", files, tmp_path / "run", "dp2", **steps, **AHEAD)
    )
    assert (tmp_path / "pushed").exists() and ages(tmp_path / "run") == [0, 1]


def _evaluate_between(config: ReinforcementStage) -> None:
    engine = HeldEngine()
    pool = ConnectedPool(engine, LonelyPush(engine))
    train_online(config, join(config), pool, replace(planned_parts(), sampler=ReleasingSampler))


def test_an_evaluation_waits_for_what_is_in_flight(files: Path, tmp_path: Path) -> None:
    held_out = {"data__eval": str(files / "prompts.jsonl"), "data__eval_samples": 2, "run__eval_every": 1}
    steps = {"run__steps": 2, "run__save_every": None}
    config = configure("reinforce_pp", files, tmp_path, **steps, **AHEAD, **held_out)
    run_ranks(1, _evaluate_between, config)
    assert ["eval/score" in entry for entry in read_metrics(tmp_path)] == [True, True]
