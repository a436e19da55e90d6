"""Crash after crash: each attempt goes on from the last checkpoint, and the result is that of an undisturbed run.

The ranks are forked, so that an attempt costs no imports; test_launches.py has the real processes.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.launched import kills
from ranks import RankError, run_ranks
from trainer.test_resume import assert_equal_runs
from trainer.tiny_runs import configure, join, train

from rto_megatron.config.schema import Stage
from rto_megatron.launching.attempts import Stopping, run_attempts
from rto_megatron.launching.torchrun import RankFailure
from rto_megatron.lifecycle.ending import LostRank, RankEnding, finished_steps
from rto_megatron.lifecycle.status import ExitReason, Status, read_status
from rto_megatron.lifecycle.stopping import STOP_FILE
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.storage.checkpoints import latest_checkpoint


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_ranks(2, train, configure("sft", files, run_dir, "dp2", run__save_every=1)) == [None] * 2
    return run_dir


def _rank(config: Stage) -> None:
    try:
        with RankEnding(config.run.dir):
            error = train(config)
            assert error is None, error
    except LostRank:
        signal.pause()  # the one that died is to be found first, as torchrun finds it


def _starts(config: Stage) -> Callable[[], RankFailure | None]:
    def start() -> RankFailure | None:
        try:
            run_ranks(2, _rank, config)
        except RankError as error:
            died = [
                rank
                for rank in range(2)
                if f"rank {rank} died, wait status {int(signal.SIGKILL)}" in str(error)
            ]
            return RankFailure(died[0], -signal.SIGKILL) if died else RankFailure(0, 1)
        return None

    return start


def launch(
    config: Stage, plan: list[str], monkeypatch: pytest.MonkeyPatch, restarts: int = 3
) -> tuple[Status, list[int]]:
    """Runs it under a plan of faults, each of which must have fired once; also the attempts that were prepared."""
    log = config.run.dir.parent / "fired"
    monkeypatch.setenv("RTO_FAULT", ",".join(plan))
    monkeypatch.setenv("RTO_FAULT_LOG", str(log))
    monkeypatch.setenv("RTO_ATTEMPT", "1")
    prepared: list[int] = []

    def prepare(attempt: int) -> bool:
        prepared.append(attempt)
        return True

    status = run_attempts(config.run.dir, restarts, Stopping(config.run.dir), prepare, _starts(config))
    assert (log.read_text().splitlines() if log.exists() else []) == plan
    assert read_status(config.run.dir) == status
    return status, prepared


@pytest.mark.slow
def test_ten_kills_in_a_row_leave_the_result_of_an_undisturbed_run(
    whole: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = kills(10)
    config = configure("sft", files, tmp_path / "run", "dp2", run__save_every=1)
    status, prepared = launch(config, plan, monkeypatch)
    assert (status.reason, status.step, status.attempt) == (ExitReason.DONE, 4, 11)
    assert prepared == list(range(2, 12))
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert_equal_runs(whole, tmp_path / "run")


def test_the_same_crash_at_the_same_step_is_not_tried_a_third_time(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("sft", files, tmp_path / "run", "dp2", run__save_every=1)
    status, prepared = launch(config, ["opt_step:2:0:raise"] * 2, monkeypatch)
    assert (status.reason, status.step, status.attempt) == (ExitReason.REPEATED_CRASH, 1, 2)
    assert "InjectedFault in platform/faults.py:_fire after step 1" in status.message
    assert prepared == [2]


def test_restarts_are_counted_only_without_progress(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("sft", files, tmp_path / "run", "dp2", run__save_every=1)
    plan = ["opt_step:1:0:kill", "fwd_bwd:2:1:kill", "opt_step:2:0:kill"]
    status, prepared = launch(config, plan, monkeypatch, restarts=1)
    assert (status.reason, status.step, status.attempt) == (ExitReason.INFRA_LOST_RANK, 1, 3)
    assert "rank 0 was ended by SIGKILL after step 1" in status.message
    assert prepared == [2, 3]


@pytest.mark.parametrize(("kind", "reason"), [("oom", ExitReason.OOM), ("disk", ExitReason.DISK)])
def test_what_would_fail_again_is_not_tried_again(
    kind: str, reason: ExitReason, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("sft", files, tmp_path / "run", "dp2", run__save_every=1)
    status, prepared = launch(config, [f"opt_step:2:1:{kind}"], monkeypatch)
    assert (status.reason, status.step, prepared) == (reason, 1, [])


def _stopped_rank(config: Stage) -> str:
    if os.environ["RANK"] == "1":
        (config.run.dir / STOP_FILE).touch()
    return str(train(config))


def test_a_stop_that_any_rank_sees_ends_all_after_the_same_step_with_a_checkpoint(
    whole: Path, files: Path, tmp_path: Path
) -> None:
    config = configure("sft", files, tmp_path / "run", "dp2", run__save_every=4)
    config.run.dir.mkdir()
    for said in run_ranks(2, _stopped_rank, config):
        assert f"told to stop; step 1 of 4 is saved in {tmp_path / 'run'}" in said
    assert finished_steps(tmp_path / "run") == 1
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step_000001"
    (tmp_path / "run" / STOP_FILE).unlink()
    assert run_ranks(2, train, config) == [None] * 2
    assert_equal_runs(whole, tmp_path / "run")


def _agree(config: Stage) -> tuple[bool, bool]:
    place = join(config)
    return place.any(place.rank == 1), place.any(False)


def test_what_one_rank_sees_all_act_upon(files: Path, tmp_path: Path) -> None:
    assert run_ranks(2, _agree, configure("sft", files, tmp_path / "run", "dp2")) == [(True, False)] * 2
