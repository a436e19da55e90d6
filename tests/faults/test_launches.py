"""Real launches: `rto launch`, torchrun and its ranks, as processes; nothing of them may be left."""

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from faults.launched import Launch, fired, kills, listeners, of_run, send, start, wait_until
from ranks import run_ranks
from trainer.test_resume import assert_equal_runs
from trainer.tiny_runs import configure, train

from rto_megatron.reporting.metrics import read_metrics

NUM_KILLS = int(os.environ.get("RTO_FAULT_KILLS", "1"))  # launchers/fault_suite.sh has ten


@pytest.mark.slow
def test_killed_ranks_and_a_stopped_one_cost_an_attempt_each(files: Path, tmp_path: Path) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert run_ranks(2, train, configure("sft", files, whole, "dp2", run__save_every=1)) == [None] * 2
    faults = [*kills(NUM_KILLS), "opt_step:4:1:stop"]
    launch = start(files, run_dir, faults=",".join(faults), run__collective_timeout_s=20)
    said = launch.end(timeout_s=400 + 60 * NUM_KILLS)
    assert launch.process.returncode == 0, said
    assert fired(run_dir) == faults
    assert "attempt 1 ended after step 0 with INFRA_LOST_RANK: rank 1 was ended by SIGKILL" in said
    last = NUM_KILLS + 1
    assert (
        f"attempt {last} ended after step 3 with HANG: rank 0 waited longer than run.collective_timeout_s"
        in said
    )
    assert (launch.status()["reason"], launch.status()["attempt"]) == ("DONE", last + 1)
    stacks = {path.name: path.read_text() for path in (run_dir / "stacks").iterdir()}
    assert sorted(stacks) == [f"attempt_{last}_rank_0.txt", f"attempt_{last}_rank_1.txt"]
    assert "in gather" in stacks[f"attempt_{last}_rank_0.txt"]
    assert "is stopped by a signal" in stacks[f"attempt_{last}_rank_1.txt"]
    assert_equal_runs(whole, run_dir)


def endless(
    files: Path, run_dir: Path, torchrun: Sequence[str] | None = None, num_threads: int = 1
) -> Launch:
    """A run of more steps than any test waits for, saved when it is told to stop."""
    return start(
        files,
        run_dir,
        run__steps=10_000,
        run__save_every=10_000,
        torchrun=torchrun,
        num_threads=num_threads,
    )


def test_a_run_that_is_told_to_stop_saves_and_ends(files: Path, tmp_path: Path) -> None:
    num_threads = max(2, len(os.sched_getaffinity(0)))  # more than cores, on two ranks
    launch = endless(files, tmp_path / "run", num_threads=num_threads)
    wait_until(lambda: bool(read_metrics(launch.run_dir)), launch)
    assert listeners(launch) == {"127.0.0.1"}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        assert {rank.environ()[variable] for rank in launch.ranks()} == {"lo"}
    assert {rank.environ()["OMP_WAIT_POLICY"] for rank in launch.ranks()} == {"PASSIVE"}
    assert launch.run_dir.stat().st_mode & 0o777 == 0o700
    send(launch, signal.SIGUSR1)
    said = launch.end()
    assert launch.process.returncode == 85, said
    step = read_metrics(launch.run_dir)[-1]["step"]
    assert (launch.status()["reason"], launch.status()["step"]) == ("PREEMPTED", step)
    assert [path.name for path in (launch.run_dir / "checkpoints").glob("step_*")] == [f"step_{step:06d}"]
    assert "Traceback" not in said
    assert f"2 processes x {num_threads} threads share" in said
    parts = ("launcher", "torchrun", "imports", "groups", "checks", "models", "data")
    told = ", ".join(rf"{part} [\d.]+" for part in parts)
    assert re.search(rf"^start-up [\d.]+ s: {told}; first step [\d.]+ s$", said, re.MULTILINE), said


@pytest.mark.slow
def test_a_signal_that_plain_torchrun_hands_on_saves_and_ends_the_run(files: Path, tmp_path: Path) -> None:
    launch = endless(files, tmp_path / "run", ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"])
    wait_until(lambda: bool(read_metrics(launch.run_dir)), launch)
    send(launch, signal.SIGUSR1)
    said = launch.end()
    step = read_metrics(launch.run_dir)[-1]["step"]
    assert (launch.status()["reason"], launch.status()["step"]) == ("PREEMPTED", step), said
    assert (launch.run_dir / f"checkpoints/step_{step:06d}").is_dir()


@pytest.mark.slow
def test_a_signal_that_ends_plain_torchrun_leaves_no_rank(files: Path, tmp_path: Path) -> None:
    """Its default for SIGUSR1: ranks of others live on without an agent."""
    launch = endless(files, tmp_path / "run", [])
    ranks = launch.ranks()
    wait_until(lambda: bool(read_metrics(launch.run_dir)), launch)
    send(launch, signal.SIGUSR1)
    assert launch.process.wait(60) == -signal.SIGUSR1
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert alive == []
    launch.end()


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_no_rank_outlives_its_launcher(signum: signal.Signals, files: Path, tmp_path: Path) -> None:
    launch = endless(files, tmp_path / "run")
    ranks = launch.ranks()
    if signum == signal.SIGKILL:  # trained ranks need their launcher for nothing
        wait_until(lambda: bool(read_metrics(launch.run_dir)), launch)
    send(launch, signum)
    launch.process.wait(150)  # torchrun gives ranks that start half a minute each
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert alive == []
    assert of_run(tmp_path) == []
    if signum == signal.SIGINT:
        assert launch.process.returncode == 130
        assert launch.status()["reason"] == "INTERRUPTED"


def test_a_mistake_is_told_once_and_leaves_no_folder(files: Path, tmp_path: Path) -> None:
    """One that the launcher sees, and one that only the ranks see."""
    absent = start(files, tmp_path / "runs" / "absent", models__policy=tmp_path / "no model")
    said = absent.end()
    assert absent.process.returncode == 2, said
    assert said.count("models.policy: ") == said.count("error") == 1, said
    few = start(files, tmp_path / "runs" / "few", batch__train=64, batch__micro=1)
    said = few.end()
    assert few.process.returncode == 2, said
    assert said.count("fewer than one global batch of 64") == 1, said
    # Rows that were read stay tokenized beside the runs, for the next one.
    left = {path.name for path in (tmp_path / "runs").iterdir()}
    assert left == {"absent.yaml", "few.yaml", "data_cache"}
