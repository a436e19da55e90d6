"""Why a run ended: `<run>/run_status.json`, from a fixed list of reasons, for people and for the next attempt."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from rto_megatron.config.run_folder import make_run_folder

STATUS_FILE = "run_status.json"
STACKS = "stacks"  # <run>/stacks: where ranks stood that crashed or hung
_EXIT_CODES = {"DONE": 0, "CONFIG": 2, "PREEMPTED": 85, "INTERRUPTED": 130}


class ExitReason(StrEnum):
    """The fixed list."""

    DONE = "DONE"
    PREEMPTED = "PREEMPTED"  # told to stop; the step was finished and saved
    INTERRUPTED = "INTERRUPTED"  # Ctrl-C: stopped at once, in order
    CONFIG = "CONFIG"
    INFRA_NO_GENERATOR = "INFRA_NO_GENERATOR"
    INFRA_NO_REWARD = "INFRA_NO_REWARD"
    INFRA_LOST_RANK = "INFRA_LOST_RANK"
    HANG = "HANG"
    NAN = "NAN"
    OOM = "OOM"
    DISK = "DISK"
    CHECKPOINT = "CHECKPOINT"
    REPEATED_CRASH = "REPEATED_CRASH"
    BUG = "BUG"

    @property
    def exit_code(self) -> int:
        """Status of `rto launch` and of the launchers' scripts; 85 asks a scheduler for another turn."""
        return _EXIT_CODES.get(self, 1)


@dataclass(frozen=True)
class Status:
    """How the last attempt ended.

    Args:
        step: finished steps, those after the last checkpoint included.
        message: for people.
        attempt: 1 is the first of a launch.
        fingerprint: of a crash; two alike at the same step are the same crash.

    Example:
        Status(ExitReason.OOM, step=12, message="rank 0 is out of memory")
    """

    reason: ExitReason
    step: int
    message: str
    attempt: int = 1
    fingerprint: str = ""


def attempt_number() -> int:
    """The number of this process's attempt; whoever starts the next one says so in RTO_ATTEMPT."""
    return int(os.environ.get("RTO_ATTEMPT", "1"))


def write_status(run_dir: Path, status: Status) -> None:
    """Replaces the run's status as a whole: a reader never sees half of one."""
    make_run_folder(run_dir)
    partial = run_dir / f"{STATUS_FILE}.{os.getpid()}.partial"
    partial.write_text(json.dumps({**asdict(status), "exit_code": status.reason.exit_code}, indent=2) + "\n")
    partial.replace(run_dir / STATUS_FILE)


def note_status(run_dir: Path, status: Status) -> None:
    """Does what `write_status` does, unless another rank has told its own end: the others only see a lost rank.

    A scheduler tells the other ranks to stop once one is lost. Their PREEMPTED is no cause: the run is to be started
    again. In a stop that was asked for, the rank that ends first says PREEMPTED before another can miss it.
    """
    before = read_status(run_dir)
    is_consequence = before is not None and before.reason is ExitReason.INFRA_LOST_RANK
    if before is None or (is_consequence and status.reason is not ExitReason.PREEMPTED):
        write_status(run_dir, status)


def clear_status(run_dir: Path) -> None:
    """At the start of an attempt: one that leaves no status was killed as a whole."""
    (run_dir / STATUS_FILE).unlink(missing_ok=True)


def drop_refused(run_dir: Path, made: Sequence[Path]) -> None:
    """Removes the folder of a run that was refused before it left anything but the word of that.

    Args:
        made: the folders that were made for it, innermost first; none where its own was there before.
    """
    if not made or not run_dir.is_dir():
        return
    status, stacks = read_status(run_dir), run_dir / STACKS
    left = {path.name for path in run_dir.iterdir()} - {STATUS_FILE}
    if (status is not None and status.reason is not ExitReason.CONFIG) or left - {STACKS}:
        return
    if stacks.is_dir() and any(stacks.iterdir()):
        return
    if stacks.is_dir():
        stacks.rmdir()
    clear_status(run_dir)
    for folder in made:
        if any(folder.iterdir()):
            return
        folder.rmdir()


def read_status(run_dir: Path) -> Status | None:
    """The run's status; None before its first end."""
    path = run_dir / STATUS_FILE
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return Status(
        ExitReason(found["reason"]),
        int(found["step"]),
        str(found["message"]),
        int(found["attempt"]),
        str(found["fingerprint"]),
    )
