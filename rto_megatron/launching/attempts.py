"""The attempts of one launch: a crash that may pass is followed by a fresh start from the last checkpoint."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import typer

from rto_megatron.engine.source import latest_checkpoint
from rto_megatron.launching.torchrun import RankFailure, has_ranks, kill_ranks
from rto_megatron.lifecycle.ending import MEMORY_KNOBS, finished_steps
from rto_megatron.lifecycle.stacks import drop_empty
from rto_megatron.lifecycle.status import STACKS, ExitReason, Status, clear_status, read_status, write_status
from rto_megatron.lifecycle.stopping import STOP_FILE, Preempted

# What may pass. Seeds are those of the step, so memory, disk and numbers would fail again in the same way.
_RETRIED = (ExitReason.INFRA_LOST_RANK, ExitReason.INFRA_NO_GENERATOR, ExitReason.HANG, ExitReason.BUG)
_MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")

Start = Callable[[], RankFailure | None]
Prepare = Callable[[int], bool]  # before an attempt, given its number; False: there is no use in it


class Stopping:
    """What the signals of a launch have asked for; see `listening`."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.is_asked = False
        self.is_attempting = False

    def finish_step(self, signum: int, frame: FrameType | None) -> None:
        """SIGTERM, SIGUSR1 and SIGHUP: the ranks finish their step and save; the second time they end at once."""
        if self.is_asked:
            self.end_now(signum, frame)
        self.is_asked = True
        if not has_ranks() and not self._have_ranks_ended():
            raise Preempted("told to stop while no rank was running")
        (self._run_dir / STOP_FILE).touch()
        typer.echo(
            "told to stop: a step that has begun is finished and saved first; a second signal ends the run at once"
        )

    def _have_ranks_ended(self) -> bool:
        return self.is_attempting and read_status(self._run_dir) is not None

    def end_now(self, signum: int, frame: FrameType | None) -> None:
        """SIGINT."""
        kill_ranks()
        raise KeyboardInterrupt


@contextmanager
def listening(run_dir: Path) -> Iterator[Stopping]:
    """Handles the signals of this process while inside, but for those that whoever started it wants ignored."""
    stopping = Stopping(run_dir)
    handlers = {
        signal.SIGINT: stopping.end_now,
        **dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP), stopping.finish_step),
    }
    heard = {one: handler for one, handler in handlers.items() if signal.getsignal(one) != signal.SIG_IGN}
    before = {one: signal.signal(one, handler) for one, handler in heard.items()}
    try:
        yield stopping
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def run_attempts(run_dir: Path, restarts: int, stopping: Stopping, prepare: Prepare, start: Start) -> Status:
    """Starts the ranks until the run has ended or is not to be started again.

    Args:
        restarts: how often in a row without a new checkpoint.
        prepare: makes the pool ready.

    Returns:
        how it ended, which run_status.json says too.
    """
    left, last = restarts, ""
    for attempt in itertools.count(1):
        saved = latest_checkpoint(run_dir)
        status = _attempt(run_dir, attempt, stopping, start)
        has_progressed = latest_checkpoint(run_dir) != saved
        if status.reason not in _RETRIED or stopping.is_asked:
            break
        if status.fingerprint == last and not has_progressed:
            repeated = f"crashed twice alike ({last}), so it is not started again: {status.message}"
            status = replace(status, reason=ExitReason.REPEATED_CRASH, message=repeated)
            break
        left, last = restarts if has_progressed else left, status.fingerprint
        if not left or not prepare(attempt + 1):
            break
        left -= 1
        typer.echo(
            f"warning: attempt {attempt} ended after step {status.step} with {status.reason}: {status.message}\n"
            f"warning: starting attempt {attempt + 1}, {left} more without a new checkpoint",
            err=True,
        )
    write_status(run_dir, status)
    return status


def _attempt(run_dir: Path, attempt: int, stopping: Stopping, start: Start) -> Status:
    os.environ["RTO_ATTEMPT"] = str(attempt)
    clear_status(run_dir)
    kills = out_of_memory_kills()
    stopping.is_attempting = True
    failure = start()
    stopping.is_attempting = False
    drop_empty(run_dir)
    told = read_status(run_dir)
    if failure is None:
        return told or Status(
            ExitReason.BUG, finished_steps(run_dir), "the ranks left no status", attempt, "silent"
        )
    # Status 1 is that of a rank that has told why: one of the others, where the one that is gone ran elsewhere.
    if told is not None and (told.reason is not ExitReason.INFRA_LOST_RANK or failure.status == 1):
        return told
    return silent_end(run_dir, failure, attempt, kills)


def silent_end(run_dir: Path, failure: RankFailure, attempt: int, kills_before: int) -> Status:
    """Of a rank that could not say why; the others saw only that it was gone.

    Args:
        kills_before: what `out_of_memory_kills` was when it started.
    """
    step, name = finished_steps(run_dir), failure.signal_name
    how = f"was ended by {name}" if name else f"ended with status {failure.status} and said nothing"
    message = f"rank {failure.rank} {how} after step {step}"
    reason = ExitReason.INFRA_LOST_RANK if name == "SIGKILL" else ExitReason.BUG
    if name == "SIGKILL" and out_of_memory_kills() > kills_before:
        reason = ExitReason.OOM
        message += f"; the kernel ended a process for want of memory in that time: {MEMORY_KNOBS}"
    elif name is not None and name != "SIGKILL":
        message += f"; its stack is in {run_dir / STACKS}"
    return Status(reason, step, message, attempt, message)


def out_of_memory_kills(events: Path = _MEMORY_EVENTS) -> int:
    """How often the kernel has ended a process of this control group for want of memory; 0 where it does not say."""
    if not events.exists():
        return 0
    counts = dict(line.split() for line in events.read_text().splitlines())
    return int(counts.get("oom_kill", "0"))
