"""Responses are scored as they come: beside the sampling of the others, in the same micro-batches, to the bit."""

import json
import math
import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from engine.layouts import LAYOUTS
from ranks import run_ranks
from trainer.tiny_runs import ENGINE_VOCAB, HeldPush, configure, join

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.errors import UserError
from rto_megatron.generation.contract import Arrived, NoServersLeft, Sampling
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.generation.stop_strings import StoppingEngine
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.arrivals import Arrivals
from rto_megatron.trainer.checked_scores import Scorer
from rto_megatron.trainer.connected_pool import ConnectedPool, SharedGpus
from rto_megatron.trainer.online import train_online
from rto_megatron.trainer.parts import Parts
from rto_megatron.types import Prompt, Rollout

STEPS = 2


class Watched(Scorer):
    """Tells how many responses the models of this process were asked of early."""

    num_heard: ClassVar = threading.Semaphore(0)

    def hear(self, sampled: Sequence[Rollout]) -> None:
        """See `Scorer.hear`."""
        super().hear(sampled)
        Watched.num_heard.release(len(sampled))


class Straggling(ScriptedEngine):
    """Gives responses in any order, and the slowest one of each replica once all other micro-batches are scored."""

    def __init__(self, micro: int, dies: bool = False) -> None:
        super().__init__(ENGINE_VOCAB)
        self._micro, self._dies = micro, dies

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, arrived: Arrived
    ) -> list[Rollout]:
        """See `StreamingEngine.stream`."""
        drawn = self.generate(prompts, sampling, version)
        order = list(range(len(drawn)))
        random.Random(version).shuffle(order)
        *first, slowest = order
        for place in first:
            arrived(place, drawn[place])
        for _ in range(len(drawn) - self._micro):
            assert Watched.num_heard.acquire(timeout=60)
        if self._dies and version == STEPS - 1:
            raise NoServersLeft("all servers ended")
        arrived(slowest, drawn[slowest])
        return drawn


def _train(config: ReinforcementStage, streams: bool, dies: bool = False) -> str | None:
    place = join(config)
    engine = None
    if place.is_replica_lead:
        engine = Straggling(config.batch.micro, dies) if streams else ScriptedEngine(ENGINE_VOCAB)
    try:
        train_online(config, place, ConnectedPool(engine, HeldPush(engine)), Parts(scorer=Watched))
    except NoServersLeft as error:
        return str(error)
    return None


def _train_both(plain: ReinforcementStage, early: ReinforcementStage) -> None:
    assert _train(plain, streams=False) is None
    assert _train(early, streams=True) is None


def _numbers(run_dir: Path) -> list[dict[str, float]]:
    """Of every step, all that no clock or allocator gives."""
    return [
        {name: value for name, value in entry.items() if not name.startswith(("time", "memory/"))}
        for entry in read_metrics(run_dir)
    ]


KEYS = {
    "run__steps": STEPS,
    "run__save_every": None,
    "batch": {"rollout": 12, "train": 4, "micro": 2},
    "rewards": [{"kind": "model"}, {"kind": "overlong", "buffer_tokens": 4}],
    "sampling": {"max_response_tokens": 8, "min_response_tokens": 2, "temperature": 0.7},
}
BOOTSTRAP = {"truncated": "bootstrap"}


@pytest.mark.parametrize(
    ("layout", "stage", "keys"),
    [
        pytest.param("tp2_sp", "reinforce_pp", {}, marks=pytest.mark.slow),
        ("pp2", "rto", {"algorithm": BOOTSTRAP, "rollout__old_logprobs": "pool"}),
        ("dp2", "rto", {"rollout__ahead": 1, "algorithm": {**BOOTSTRAP, "pool_importance_cap": 2.0}}),
    ],
)
def test_numbers_are_those_of_responses_that_came_at_once(
    layout: str, stage: str, keys: dict[str, object], files: Path, tmp_path: Path
) -> None:
    plain, early = (
        configure(stage, files, tmp_path / name, layout, **{**KEYS, **keys}) for name in ("plain", "early")
    )
    run_ranks(LAYOUTS[layout][0], _train_both, plain, early)
    assert len(_numbers(tmp_path / "plain")) == STEPS
    assert _numbers(tmp_path / "early") == _numbers(tmp_path / "plain")
    seconds = [
        [entry["time/score_early_s"] for entry in read_metrics(tmp_path / name)]
        for name in ("plain", "early")
    ]
    assert seconds[0] == [0.0] * STEPS and min(seconds[1]) > 0
    # No model is asked twice.
    flops = [
        [entry["time/model_tflops"] * entry["time/step_s"] for entry in read_metrics(tmp_path / name)]
        for name in ("plain", "early")
    ]
    assert flops[1] == pytest.approx(flops[0])


def test_a_pool_that_dies_behind_its_first_responses_ends_the_run_saved(files: Path, tmp_path: Path) -> None:
    config = configure("rto", files, tmp_path, "dp2", **KEYS)
    for ended in run_ranks(2, _train, config, streams=True, dies=True):
        assert ended is not None and ended.startswith(f"all servers ended\nstep 1 is saved in {tmp_path}")


class Broken(Straggling):
    """Its first response has no token, or no log-probs that are numbers."""

    def __init__(self, micro: int, is_empty: bool) -> None:
        super().__init__(micro)
        self._is_empty = is_empty

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        first, *others = super().generate(prompts, sampling, version)
        broken = replace(first, sampled_logprobs=(math.nan,) * len(first.response_ids))
        return [replace(first, response_ids=(), sampled_logprobs=()) if self._is_empty else broken, *others]


def _train_broken(config: ReinforcementStage, is_empty: bool) -> str:
    place = join(config)
    engine = Broken(config.batch.micro, is_empty) if place.is_replica_lead else None
    with pytest.raises(UserError) as caught:
        train_online(config, place, ConnectedPool(engine, HeldPush(engine)), Parts(scorer=Watched))
    return str(caught.value)


@pytest.mark.parametrize(
    ("layout", "is_empty", "part"),
    # A NaN, sent to the other ranks twice, is the same response all the same.
    [("one", True, "a response has no token"), ("tp2", False, "a log-prob of the pool is NaN or infinite")],
)
def test_what_must_not_be_trained_on_is_refused_once_all_is_there(
    layout: str, is_empty: bool, part: str, files: Path, tmp_path: Path
) -> None:
    keys = {**KEYS, "run__steps": 1, "run__max_skipped_updates": 1}
    config = configure("reinforce_pp", files, tmp_path, layout, **keys)
    for error in run_ranks(LAYOUTS[layout][0], _train_broken, config, is_empty):
        assert part in error


class Alone(Straggling):
    """As `Straggling`, where the trainer must not compute before it has all responses."""

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, arrived: Arrived
    ) -> list[Rollout]:
        """See `StreamingEngine.stream`."""
        drawn = self.generate(prompts, sampling, version)
        for place in range(len(drawn) - 1):
            arrived(place, drawn[place])
        assert not Watched.num_heard.acquire(timeout=1)
        return drawn


class Turns(SharedGpus):
    """Turns of a pool that has no servers."""

    def __init__(self) -> None:
        self.num_taken = 0

    def take_from_pool(self) -> None:
        """See `SharedGpus.take_from_pool`."""
        self.num_taken += 1


def _train_in_turns(config: ReinforcementStage) -> int:
    engine, turns = Alone(config.batch.micro), Turns()
    train_online(config, join(config), ConnectedPool(engine, HeldPush(engine), turns), Parts(scorer=Watched))
    return turns.num_taken


def test_nothing_is_scored_while_a_pool_has_the_gpus(files: Path, tmp_path: Path) -> None:
    config = configure("reinforce_pp", files, tmp_path, **{**KEYS, "run__steps": 1})
    assert run_ranks(1, _train_in_turns, config) == [1]


def _train_alone(config: ReinforcementStage) -> None:
    place = join(config)
    engine = Alone(config.batch.micro) if place.is_replica_lead else None
    train_online(config, place, ConnectedPool(engine, HeldPush(engine)), Parts(scorer=Watched))


def test_a_role_of_another_layout_is_asked_once_all_is_there(files: Path, tmp_path: Path) -> None:
    keys = {**KEYS, "run__steps": 1, "parallel__roles": {"reward": {"tensor": 2}}}
    assert run_ranks(2, _train_alone, configure("rto", files, tmp_path, "dp2", **keys)) == [None] * 2


def _rollout(place: int) -> Rollout:
    return Rollout(f"p{place}", (1,), (place, 2), (-1.0, -1.0), "stop", 0)


def test_whole_micro_batches_are_handed_on_in_their_order() -> None:
    arrivals = Arrivals(num_responses=7, micro=2)
    for place in (6, 5, 2, 4, 1, 3):
        arrivals.put(place, _rollout(place))
    assert [one.prompt_id for one in arrivals.take()] == ["p2", "p3", "p4", "p5", "p6"]
    arrivals.put(0, _rollout(0))
    arrivals.end()
    assert arrivals.take() == []  # the rest is in the answer


def test_a_response_that_comes_early_ends_at_the_same_text() -> None:
    engine = StoppingEngine(Straggling(micro=4), ("7",), lambda ids: " ".join(map(str, ids)))
    came: dict[int, Rollout] = {}
    prompts = [Prompt(f"p{number}", (1, number)) for number in range(4)]
    drawn = engine.stream(prompts, Sampling(max_tokens=24, eos_ids=(2,), seed=5), 0, came.__setitem__)
    assert (
        [came[place] for place in range(4)]
        == drawn
        == engine.generate(prompts, Sampling(24, (2,), seed=5), 0)
    )
    assert any(json.dumps(one.response_ids[-1]).find("7") >= 0 for one in drawn)
