"""One run in a folder at a time: who holds it keeps it as long as he lives, and nobody waits for the dead."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.errors import RunFolderError
from rto_megatron.lifecycle.run_lock import LOCK_FILE, Heartbeat, held, held_by_rank, require_free
from rto_megatron.lifecycle.status import ExitReason, Status, write_status

ROOT = Path(__file__).parents[2]
_HOLD = """
import sys, time
from pathlib import Path
from rto_megatron.lifecycle.run_lock import Heartbeat, held
with held(Path(sys.argv[1]), Heartbeat(beat=0.02)):
    print("held", flush=True)
    time.sleep(60)
"""
QUICK = Heartbeat(beat=0.02, gone=60.0, watch=0.3)


@contextmanager
def holder(run_dir: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(run_dir)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n", process.stderr
        yield process
    finally:
        process.kill()
        process.communicate()


def edit(run_dir: Path, **changes: object) -> None:
    """A lock as another process or machine would have written it."""
    path = run_dir / LOCK_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def left_behind(run_dir: Path, **changes: object) -> Path:
    """The lock of this living process on another machine, beaten just now."""
    with held(run_dir):
        text = (run_dir / LOCK_FILE).read_text()
    run_dir.mkdir(exist_ok=True)
    (run_dir / LOCK_FILE).write_text(text)
    edit(run_dir, **{"boot": "another", "host": "node7", **changes})
    return run_dir / LOCK_FILE


def age(path: Path, seconds: int) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns - seconds * 10**9))


def test_a_folder_has_one_run_and_the_dead_hold_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "a #1" / "run"
    with holder(run_dir) as process:
        before = {path: path.stat().st_mtime_ns for path in run_dir.iterdir() if path.name != LOCK_FILE}
        found = json.loads((run_dir / LOCK_FILE).read_text())
        assert (found["process"], found["host"]) == (process.pid, os.uname().nodename)
        age(run_dir / LOCK_FILE, 10**6)  # who is seen to live needs no beat
        with (
            pytest.raises(
                RunFolderError, match=rf"is in use: process {process.pid} of .*, since 20"
            ) as caught,
            held(run_dir),
        ):
            pass
        assert f"touch '{run_dir}/STOP'" in str(caught.value)
        assert f"remove '{run_dir}/{LOCK_FILE}'" in str(caught.value)
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            with pytest.raises(RunFolderError, match="is in use"), held_by_rank(run_dir):
                pass
        with pytest.raises(RunFolderError, match="is in use"):
            require_free(run_dir)
        assert {
            path: path.stat().st_mtime_ns for path in run_dir.iterdir() if path.name != LOCK_FILE
        } == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        require_free(run_dir)
        with held(run_dir):
            assert json.loads((run_dir / LOCK_FILE).read_text())["process"] == os.getpid()
    assert list(run_dir.iterdir()) == []


def test_a_number_of_a_process_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)  # alive, but without a beat, which would take its lock back
        edit(tmp_path, ticks=1)
        with held(tmp_path):
            pass


def test_a_holder_on_another_machine_is_gone_after_missed_beats(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    with pytest.raises(RunFolderError, match=r"is in use: process \d+ of node7"), held(tmp_path, QUICK):
        pass
    age(path, 181)
    require_free(tmp_path)
    started = time.monotonic()
    with held(tmp_path, QUICK):
        assert time.monotonic() - started >= QUICK.watch
        assert json.loads(path.read_text())["host"] != "node7"
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_jumped_takes_no_folder_from_the_living(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    age(path, 3600)
    beats = threading.Timer(0.1, os.utime, [path])
    beats.start()
    with pytest.raises(RunFolderError, match="is in use"), held(tmp_path, QUICK):
        pass
    beats.join()


def test_a_lock_that_nobody_wrote_to_the_end_is_held_for_a_while(tmp_path: Path) -> None:
    path = tmp_path / LOCK_FILE
    path.write_text('{"owner": ')
    with (
        pytest.raises(RunFolderError, match="in use: a process that has not said who it is"),
        held(tmp_path, QUICK),
    ):
        pass
    age(path, 61)
    with held(tmp_path, QUICK):
        pass


@pytest.mark.parametrize(
    ("before", "after", "is_taken"),
    [
        (("7", "0", "1"), ("7", "1", "1"), True),  # the job was queued again
        (("7", "0", "1"), ("7", "0", "2"), True),  # the next attempt
        (("7", "0", "1"), ("7", "0", "1"), False),  # two runs side by side in one allocation
        (("7", "1", "1"), ("7", "0", "2"), False),
        (("7", "0", "1"), ("8", "1", "2"), False),
        ((None, "0", "1"), (None, "0", "2"), False),
    ],
)
def test_the_same_job_goes_on_at_once(
    before: tuple[str | None, str, str],
    after: tuple[str | None, str, str],
    is_taken: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "RTO_ATTEMPT")

    def be(turn: tuple[str | None, str, str]) -> None:
        for name, value in zip(names, turn, strict=True):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)

    be(before)
    path = left_behind(tmp_path)
    be(after)
    if is_taken:
        require_free(tmp_path)
        with held(tmp_path):
            assert json.loads(path.read_text())["boot"] != "another"
    else:
        with pytest.raises(RunFolderError, match="is in use"), held(tmp_path):
            pass


def test_a_second_job_leaves_no_word_in_the_folder_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word of its own would hide how the first one ends: it would not be queued again, or again though done."""
    recipe = str(ROOT / "launchers" / "recipes" / "quickstart" / "sft.yaml")
    meeting = ["--meeting", "127.0.0.1:1", "--meeting-id", "8.0.1", "--interface", "lo"]
    node = ["node", recipe, f"run.dir={tmp_path}", *meeting, "--nodes", "1", "--ranks", "1"]
    decision = ["after-attempt", str(tmp_path), "--attempt", "1", "--restarts", "3"]
    with holder(tmp_path, SLURM_JOB_ID="7"):
        (tmp_path / "attempts.json").write_text("of the first")
        before = {path.name: path.read_text() for path in tmp_path.iterdir()}
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        for command in (node, decision):
            with pytest.raises(RunFolderError, match=r"is in use: .*SLURM job 7"):
                CliRunner().invoke(app, command, catch_exceptions=False)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
        monkeypatch.setenv("SLURM_JOB_ID", "7")  # of a rank that was killed, its lock is left
        done = CliRunner().invoke(app, decision, catch_exceptions=False)
    assert done.stdout.startswith("AGAIN 1 the trainer ended: INFRA_LOST_RANK")


def test_a_run_that_was_taken_over_ends_before_it_writes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(tmp_path, SLURM_JOB_ID="7") as process:
        for name, value in {"SLURM_JOB_ID": "7", "RTO_ATTEMPT": "2"}.items():
            monkeypatch.setenv(name, value)
        with held(tmp_path):
            _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"error: {tmp_path} was taken over: process {os.getpid()} of" in said


def test_a_beat_renews_the_lock_and_makes_one_again_that_was_removed(tmp_path: Path) -> None:
    path = tmp_path / LOCK_FILE
    with held(tmp_path, QUICK):
        text = path.read_text()
        age(path, 3600)
        old = path.stat().st_mtime_ns
        _until(lambda: path.stat().st_mtime_ns > old)
        path.unlink()
        _until(path.exists)
        _until(lambda: path.read_text() == text)
    assert not path.exists()


def _until(is_so: object) -> None:
    assert callable(is_so)
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_are_at_home_where_their_launch_holds_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(tmp_path) as owner:
        text = (tmp_path / LOCK_FILE).read_text()
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("RTO_LAUNCH", owner)
            with held_by_rank(tmp_path):
                pass
            monkeypatch.setenv("RTO_LAUNCH", "another")
            with pytest.raises(RunFolderError, match="is in use"), held_by_rank(tmp_path):
                pass
        assert (tmp_path / LOCK_FILE).read_text() == text


def test_ranks_that_torchrun_started_share_what_their_lead_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29501",
        "RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    with held_by_rank(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with held_by_rank(tmp_path):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(RunFolderError, match="is in use"), held_by_rank(tmp_path):
            pass


def test_one_of_many_gets_the_folder_of_a_dead_run(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
    script = _HOLD.replace("time.sleep(60)", "sys.stdin.read()")
    script = script.replace("with held", "sys.stdin.readline()\nwith held")
    many = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for one in many:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    losers = [one for one in many if not one.stdout.readline()]
    assert len(losers) == 3
    assert all("is in use: process" in one.communicate()[1] for one in losers)
    (winner,) = (one for one in many if one not in losers)
    assert winner.communicate() == ("", "")


def test_what_only_reads_a_folder_takes_nothing(tmp_path: Path) -> None:
    recipe = str(ROOT / "launchers" / "recipes" / "quickstart" / "sft.yaml")
    path = left_behind(tmp_path / "run")
    age(path, 10**6)
    text = path.read_text()
    given = [recipe, f"run.dir={tmp_path / 'run'}"]
    assert CliRunner().invoke(app, ["check", *given]).exit_code == 0
    CliRunner().invoke(app, ["doctor", *given, "--json"])
    CliRunner().invoke(app, ["report", str(tmp_path)])
    assert path.read_text() == text
    assert [one.name for one in (tmp_path / "run").iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("reason", [ExitReason.CONFIG, ExitReason.OOM, None])
def test_a_folder_that_was_made_for_a_refused_run_goes_again(
    reason: ExitReason | None, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "new"
    with held(run_dir):
        (run_dir / "stacks").mkdir()
        if reason is not None:
            write_status(run_dir, Status(reason, 0, "no"))
    assert (tmp_path / "runs").exists() == (reason is ExitReason.OOM)
    there = tmp_path / "there"
    there.mkdir()
    with held(there):
        write_status(there, Status(ExitReason.CONFIG, 0, "no"))
    assert [path.name for path in there.iterdir()] == ["run_status.json"]


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunFolderError, match=r"file is a file; expected the name of a folder to write"),
        held(tmp_path / "file"),
    ):
        pass
