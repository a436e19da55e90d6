"""Rollouts ahead of the trainer: drawn beside the training, within a bound, and never lost or waited for in vain."""

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from engine.layouts import LAYOUTS
from ranks import RankError, run_ranks
from trainer.tiny_runs import ENGINE_VOCAB, HeldPush, configure, join

from rto_megatron.config.checks import find_problems
from rto_megatron.config.load import load_recipe
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.data.batches import BatchesState
from rto_megatron.errors import UserError
from rto_megatron.generation.contract import NoServersLeft, Sampling
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.lifecycle.stopping import STOP_FILE
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.reporting.rates import rates
from rto_megatron.reporting.rollout_files import read_rollouts
from rto_megatron.storage.checkpoints import latest_checkpoint
from rto_megatron.trainer.ahead import AheadSampler, AskedBatch, kept_ahead
from rto_megatron.trainer.arrivals import Arrivals, Hear
from rto_megatron.trainer.checked_scores import Scorer
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.online import train_online
from rto_megatron.trainer.parts import Parts, planned_parts
from rto_megatron.trainer.pool_requests import Asked, PoolAnswer, answered
from rto_megatron.trainer.resume import fixed_keys, read_ahead, require_same
from rto_megatron.trainer.sampler import OnPolicySampler
from rto_megatron.types import Metrics, Prompt, Rollout, ScoredRollouts

AHEAD = {"rollout__ahead": 1, "algorithm__pool_importance_cap": 2.0}
REASON = "no inference server is left to sample from: http://a ended"


class Eventful(ScriptedEngine):
    """Does something before it answers for a version."""

    def __init__(self, run_dir: Path, dies_at: int | None = None, stops_at: int | None = None) -> None:
        super().__init__(ENGINE_VOCAB)
        self._stop = run_dir / STOP_FILE
        self._dies_at, self._stops_at = dies_at, stops_at

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        if version == self._dies_at:
            raise NoServersLeft(REASON)
        if version == self._stops_at:
            self._stop.touch()
        return super().generate(prompts, sampling, version)


def train(
    config: ReinforcementStage, dies_at: int | None = None, stops_at: int | None = None, mortal: int = 0
) -> tuple[str, str] | None:
    """Runs as one rank; kind and text of the error for the user that ended it."""
    place = join(config)
    engine = None
    if place.is_replica_lead:
        engine = Eventful(config.run.dir, dies_at if place.rank == mortal else None, stops_at)
    try:
        train_online(config, place, ConnectedPool(engine, HeldPush(engine)))
    except UserError as error:
        return type(error).__name__, str(error)
    return None


def ages(run_dir: Path) -> list[float]:
    return [entry["rollout/age_steps"] for entry in read_metrics(run_dir)]


def test_a_run_that_is_told_to_stop_keeps_what_is_in_flight(files: Path, tmp_path: Path) -> None:
    config = configure("reinforce_pp", files, tmp_path, run__steps=3, run__save_every=None, **AHEAD)
    ((kind, _),) = run_ranks(1, train, config, stops_at=1)
    assert kind == "Preempted"
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.name == "step_000002"
    kept = read_ahead(checkpoint)
    assert len(kept) == config.responses_per_step and {rollout.weight_version for rollout in kept} == {1}
    (tmp_path / STOP_FILE).unlink()
    # Asked again for the batch that the checkpoint holds, the pool would end this attempt.
    assert run_ranks(1, train, config, dies_at=2) == [None]
    assert ages(tmp_path) == [0, 1, 1]


@pytest.mark.parametrize(("dies_at", "step"), [(1, 2), (2, 3)])
def test_a_pool_that_dies_in_flight_ends_the_run_saved_and_it_goes_on(
    dies_at: int, step: int, files: Path, tmp_path: Path
) -> None:
    config = configure("reinforce_pp", files, tmp_path, "dp2", **AHEAD)
    for ended in run_ranks(2, train, config, dies_at=dies_at, mortal=1):
        kept = f"step {step} is saved in {tmp_path}; start the pool again, and then the run as before"
        assert ended is not None and ended[0] == "NoServersLeft"
        assert ended[1].startswith(f"{REASON}\n{kept}")
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.name == f"step_{step:06d}"
    assert read_ahead(checkpoint) == ()
    assert run_ranks(2, train, config) == [None] * 2
    assert ages(tmp_path) == [0 if number == step else min(number, 1) for number in range(4)]


def test_a_bug_in_the_thread_ends_the_rank(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RTO_FAULT", "in_gen:2:0:raise")
    monkeypatch.setenv("RTO_FAULT_LOG", str(tmp_path / "fired"))
    config = configure("reinforce_pp", files, tmp_path / "run", **AHEAD)
    with pytest.raises(RankError, match="InjectedFault: injected fault in_gen:2:0:raise"):
        run_ranks(1, train, config)
    assert ages(tmp_path / "run") == [0, 1]


def test_one_push_samples_two_batches_ahead(files: Path, tmp_path: Path) -> None:
    two = {**AHEAD, "rollout__ahead": 2, "run__steps": 5, "run__save_every": None}
    assert run_ranks(1, train, configure("reinforce_pp", files, tmp_path, **two)) == [None]
    assert ages(tmp_path) == [0, 1, 2, 1, 2]


class DrawingThrice(AheadSampler):
    """Takes all that is ahead, and one more batch, in the second step, as who chooses among rollouts may."""

    def draw(self, step: int, hear: Hear | None = None) -> tuple[Rollout, ...]:
        """See `Sampler.draw`."""
        return [super(DrawingThrice, self).draw(step, hear) for _ in range(3 if step == 1 else 1)][-1]

    def measured(self) -> Metrics:
        """See `Sampler.measured`."""
        found = super().measured()
        with (self._config.run.dir / "draws").open("a") as file:
            file.write(f"{found['time/generate_s'][1]:g} ")
        return found


def _draw_thrice(config: ReinforcementStage) -> list[int]:
    engine, pushed = ScriptedEngine(ENGINE_VOCAB), []

    class NotedPush(HeldPush):
        def __call__(self, version: int) -> dict[str, float]:
            pushed.append(version)
            return super().__call__(version)

    pool = ConnectedPool(engine, NotedPush(engine))
    train_online(config, join(config), pool, replace(planned_parts(), sampler=DrawingThrice))
    return pushed


def test_one_push_refills_what_was_taken_in_one_step(files: Path, tmp_path: Path) -> None:
    two = {**AHEAD, "rollout__ahead": 2, "run__save_every": None}
    (pushed,) = run_ranks(1, _draw_thrice, configure("reinforce_pp", files, tmp_path / "two", **two))
    assert ages(tmp_path / "two") == [0, 0, 1, 2]
    assert pushed == [0, 1, 3, 4]
    assert (tmp_path / "two/draws").read_text().split() == ["1", "3", "1", "1"]
    # The first batch is the one of a run that draws nothing ahead.
    plain = configure("reinforce_pp", files, tmp_path / "plain", run__steps=1, run__save_every=None)
    assert run_ranks(1, train, plain) == [None]
    first, same = (
        [row["response_ids"] for row in read_rollouts(tmp_path / name).to_pylist() if row["step"] == 1]
        for name in ("two", "plain")
    )
    assert first == same and len(first) == plain.responses_per_step


def _kept_around_a_failure(config: ReinforcementStage) -> list[str]:
    rollouts = [Rollout(name, (1,), (2,), (-1.0,), "stop", 0) for name in "ab"]
    failed: Future[PoolAnswer] = Future()
    failed.set_result(PoolAnswer((), NoServersLeft(REASON), 0.0))
    asked = [answered((rollouts[0],)), Asked(failed, Arrivals(0, 1)), answered((rollouts[1],))]
    batches = [AskedBatch(one, BatchesState(number, 0)) for number, one in enumerate(asked)]
    return [rollout.prompt_id for rollout in kept_ahead(batches, 1, join(config))]


def test_what_comes_behind_a_failed_batch_is_not_kept(files: Path, tmp_path: Path) -> None:
    """A resumed run takes what is kept for its next batches, in their order."""
    config = configure("reinforce_pp", files, tmp_path, **AHEAD)
    assert run_ranks(1, _kept_around_a_failure, config) == [["a"]]


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


class OldSampler(OnPolicySampler):
    """Hands out rollouts that are two steps older than it says."""

    def draw(self, step: int, hear: Hear | None = None) -> tuple[Rollout, ...]:
        """See `Sampler.draw`."""
        return tuple(replace(one, weight_version=one.weight_version - 2) for one in super().draw(step))


def _train_old(config: ReinforcementStage) -> str:
    place = join(config)
    engine = ScriptedEngine(ENGINE_VOCAB) if place.is_replica_lead else None
    with pytest.raises(UserError) as caught:
        train_online(config, place, ConnectedPool(engine, HeldPush(engine)), Parts(sampler=OldSampler))
    return str(caught.value)


def test_rollouts_beyond_the_bound_are_never_trained_on(files: Path, tmp_path: Path) -> None:
    config = configure("reinforce_pp", files, tmp_path, "dp2", **AHEAD)
    for message in run_ranks(LAYOUTS["dp2"][0], _train_old, config):
        assert "was sampled by policy version -2, expected -1 to 0; nothing was trained on it" in message
    assert ages(tmp_path) == []


RECIPE = Path(__file__).parents[2] / "launchers" / "recipes" / "llama3_8b" / "rto.yaml"


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ((), "needs their correction; set algorithm.pool_importance_cap=2"),
        (
            ("algorithm.pool_importance_cap=2", "rollout.colocated=true", "rollout.gpu_memory_fraction=0.4"),
            "rollout.ahead=1 cannot work with rollout.colocated=true",
        ),
        (("algorithm.pool_importance_cap=2", "run.steps=1"), "is not below run.steps=1"),
    ],
)
def test_ahead_with_what_cannot_is_refused(overrides: Sequence[str], part: str) -> None:
    assert not any("ahead" in problem for problem in find_problems(load_recipe(RECIPE, overrides), 4, {}))
    config = load_recipe(RECIPE, ("rollout.ahead=1", *overrides))
    problems = [problem for problem in find_problems(config, 4, {}) if "ahead" in problem]
    assert len(problems) == 1 and part in problems[0]


def test_ahead_and_its_correction_are_fixed_on_resume(files: Path, tmp_path: Path) -> None:
    config = configure("rto", files, tmp_path, **AHEAD)
    saved = fixed_keys(config)
    require_same(saved, fixed_keys(config), tmp_path)
    # As a checkpoint of before these keys: it was made with what every run did.
    older = {key: value for key, value in saved.items() if key not in ("rollout.ahead", MODE)}
    for known, changes, line in (
        (saved, {"rollout__ahead": 2}, "rollout.ahead: 1 in the checkpoint, 2 in the configuration"),
        (saved, {"rollout__ahead": 0}, "rollout.ahead: 1 in the checkpoint, 0 in the configuration"),
        (older, {}, "rollout.ahead: 0 in the checkpoint, 1 in the configuration"),
        (older, {"rollout__ahead": 0, "algorithm__pool_importance_mode": "sequence_mask"}, MODE),
        (saved, {"algorithm__pool_importance_mode": "token_mask"}, MODE),
        (
            saved,
            {"algorithm__pool_importance_cap": 3.0},
            "algorithm.pool_importance_cap: 2.0 in the checkpoint",
        ),
    ):
        with pytest.raises(UserError) as caught:
            require_same(
                known, fixed_keys(configure("rto", files, tmp_path, **{**AHEAD, **changes})), tmp_path
            )
        assert line in str(caught.value)
    require_same(
        older, fixed_keys(configure("rto", files, tmp_path, **{**AHEAD, "rollout__ahead": 0})), tmp_path
    )
    servers = fixed_keys(configure("rto", files, tmp_path, **AHEAD, rollout__retries=7))
    require_same(saved, servers, tmp_path)


MODE = "algorithm.pool_importance_mode"


def test_a_process_does_not_wait_for_what_is_in_flight() -> None:
    code = (
        "import threading; from rto_megatron.trainer.background import Background; begun = threading.Event()\n"
        "def never(): begun.set(); threading.Event().wait()\n"
        "Background('pool').submit(never); assert begun.wait(20); raise SystemExit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 7


def test_a_future_carries_what_its_call_raises_and_the_next_is_made() -> None:
    from rto_megatron.trainer.background import Background

    background = Background("pool")
    failing: Future[int] = background.submit(lambda: 1 // 0)
    assert background.submit(lambda: 5).result(20) == 5
    with pytest.raises(ZeroDivisionError):
        failing.result(20)
    background.close()


def test_rates_are_counts_of_all_replicas_over_the_seconds_of_their_phase() -> None:
    means = {"rollout/response_tokens": 30.0, "rollout/prompt_tokens": 10.0, "time/generate_s": 2.0,
             "time/score_s": 4.0, "time/update_s": 5.0, "time/step_s": 8.0}  # fmt: skip
    assert rates(means, num_responses=16, epochs=2, num_ranks=4) == {
        "time/samples_per_s": 2.0,
        "time/sample_tokens_per_s": 240.0,
        "time/score_tokens_per_s": 160.0,
        "time/update_tokens_per_s": 256.0,
        "time/score_tokens_per_s_per_rank": 40.0,
        "time/update_tokens_per_s_per_rank": 64.0,
    }
    assert rates({"time/step_s": 8.0}, 16, 2, 4) == {"time/samples_per_s": 2.0}
