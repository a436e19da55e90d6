"""Rollouts ahead of the trainer: drawn within a bound, never lost, and of one kind for a run's whole life."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from engine.layouts import LAYOUTS
from ranks import RankError, run_ranks
from trainer.tiny_runs import AHEAD, ENGINE_VOCAB, HeldPush, ages, configure, join

from rto_megatron.config.checks import find_problems
from rto_megatron.config.load import load_recipe
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.data.batches import BatchesState
from rto_megatron.errors import UserError
from rto_megatron.generation.contract import NoServersLeft, Sampling
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.lifecycle.stopping import STOP_FILE
from rto_megatron.reporting.rollout_files import read_rollouts
from rto_megatron.storage.checkpoints import latest_checkpoint
from rto_megatron.trainer.ahead import AheadSampler, AskedBatch, kept_ahead
from rto_megatron.trainer.arrivals import Arrivals, Hear
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.online import train_online
from rto_megatron.trainer.parts import Parts, planned_parts
from rto_megatron.trainer.pool_requests import Asked, PoolAnswer, answered
from rto_megatron.trainer.resume import fixed_keys, read_ahead, require_same
from rto_megatron.trainer.sampler import OnPolicySampler
from rto_megatron.types import Metrics, Prompt, Rollout

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
