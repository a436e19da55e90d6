"""Why a rank ended stands in run_status.json, in a word of the fixed list."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from rto_megatron.engine.integrity import CheckpointError, DiskFull
from rto_megatron.errors import UserError
from rto_megatron.generation.contract import NoServersLeft
from rto_megatron.launching.attempts import out_of_memory_kills
from rto_megatron.lifecycle.ending import Hang, LostRank, NoSpace, OutOfMemory, RankEnding
from rto_megatron.lifecycle.status import ExitReason, Status, note_status, read_status, write_status
from rto_megatron.lifecycle.stopping import STOP_FILE, Preempted, forget_old_request, is_asked_to_stop
from rto_megatron.rewards.service import RewardServiceLost
from rto_megatron.trainer.guard import NotFiniteError

_CLOSED = "[/x/pair.cc:553] Connection closed by peer [127.0.0.1]:32669. This is typically caused by a crash."
_LATE = "[/x/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete"


@pytest.mark.parametrize(
    ("error", "reason", "told"),
    [
        (UserError("run.dir is a file"), "CONFIG", UserError),
        (NoServersLeft("all are out"), "INFRA_NO_GENERATOR", NoServersLeft),
        (RewardServiceLost("down"), "INFRA_NO_REWARD", RewardServiceLost),
        (NotFiniteError("NaN"), "NAN", NotFiniteError),
        (CheckpointError("damaged"), "CHECKPOINT", CheckpointError),
        (DiskFull("full"), "DISK", DiskFull),
        (Preempted("step 3 is saved"), "PREEMPTED", Preempted),
        (OSError(errno.ENOSPC, "No space left on device"), "DISK", NoSpace),
        (MemoryError(), "OOM", OutOfMemory),
        (torch.OutOfMemoryError("CUDA out of memory"), "OOM", OutOfMemory),
        (RuntimeError(_CLOSED), "INFRA_LOST_RANK", LostRank),
        (RuntimeError(_LATE), "HANG", Hang),
        (KeyboardInterrupt(), "INTERRUPTED", KeyboardInterrupt),
        (IndexError("list index out of range"), "BUG", IndexError),
        (OSError(errno.ENOENT, "No such file"), "BUG", OSError),
    ],
)
def test_every_end_has_its_reason(
    error: BaseException, reason: str, told: type[BaseException], tmp_path: Path
) -> None:
    with pytest.raises(told), RankEnding(tmp_path):
        raise error
    status = json.loads((tmp_path / "run_status.json").read_text())
    assert status["reason"] == reason
    assert status["exit_code"] == {"PREEMPTED": 85, "CONFIG": 2, "INTERRUPTED": 130}.get(reason, 1)


def test_a_run_that_ends_well_is_done(tmp_path: Path) -> None:
    with RankEnding(tmp_path):
        assert read_status(tmp_path) is None
    assert read_status(tmp_path) == Status(ExitReason.DONE, 0, "")
    assert ExitReason.DONE.exit_code == 0
    assert list((tmp_path / "stacks").iterdir()) == []


def test_memory_that_the_host_refuses_is_named_with_what_to_turn(tmp_path: Path) -> None:
    with (
        pytest.raises(OutOfMemory, match=r"batch\.micro.*precision\.recompute.*parallel\.tensor"),
        RankEnding(tmp_path),
    ):
        torch.empty(1 << 50)


def test_a_rank_that_saw_another_go_does_not_hide_why_it_went(tmp_path: Path) -> None:
    seen, why = Status(ExitReason.INFRA_LOST_RANK, 3, "gone"), Status(ExitReason.OOM, 3, "no memory")
    note_status(tmp_path, seen)
    note_status(tmp_path, why)
    note_status(tmp_path, seen)
    assert read_status(tmp_path) == why


LOST, TOLD = (Status(reason, 3, "gone") for reason in (ExitReason.INFRA_LOST_RANK, ExitReason.PREEMPTED))


@pytest.mark.parametrize(("first", "second"), [(LOST, TOLD), (TOLD, LOST)], ids=["lost first", "told first"])
def test_of_a_stop_and_a_lost_rank_the_first_is_the_cause(
    first: Status, second: Status, tmp_path: Path
) -> None:
    """SLURM tells ranks to stop once one is lost (srun --kill-on-bad-exit): a job must not take it for its time's end.

    Ranks that miss one which was told to stop do not hide that either.
    """
    note_status(tmp_path, first)
    note_status(tmp_path, second)
    assert read_status(tmp_path) == first


def test_a_crash_names_the_innermost_place_of_the_package(tmp_path: Path) -> None:
    with pytest.raises(json.JSONDecodeError), RankEnding(tmp_path):
        (tmp_path / "run_status.json").write_text("{")
        read_status(tmp_path)
    (tmp_path / "run_status.json").unlink()
    with pytest.raises(IsADirectoryError), RankEnding(tmp_path):
        (tmp_path / "run_status.json").mkdir()
        try:
            read_status(tmp_path)
        finally:
            (tmp_path / "run_status.json").rmdir()
    found = read_status(tmp_path)
    assert found is not None
    assert found.fingerprint == "IsADirectoryError in lifecycle/status.py:read_status after step 0"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_a_rank_asks_the_run_to_stop(signum: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(signum)
    with RankEnding(tmp_path):
        assert not is_asked_to_stop(tmp_path)
        os.kill(os.getpid(), signum)
        assert is_asked_to_stop(tmp_path)
        assert signal.getsignal(signum) is signal.SIG_DFL  # a second one ends the process
    assert signal.getsignal(signum) is before


def test_only_an_old_request_to_stop_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).touch()
    forget_old_request(tmp_path)
    assert is_asked_to_stop(tmp_path)
    os.utime(tmp_path / STOP_FILE, (0, 0))
    forget_old_request(tmp_path)
    assert not is_asked_to_stop(tmp_path)


def test_the_kernels_count_of_processes_without_memory_is_read(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    assert out_of_memory_kills(events) == 0
    events.write_text("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert out_of_memory_kills(events) == 2


def test_a_status_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_status(tmp_path, Status(ExitReason.BUG, 1, "first"))
    write_status(tmp_path, Status(ExitReason.DONE, 4, "", 2))
    assert [path.name for path in tmp_path.iterdir()] == ["run_status.json"]
    assert read_status(tmp_path) == Status(ExitReason.DONE, 4, "", 2)
