"""The attempts of one launch: a crash that may pass is followed by a fresh start from the last checkpoint.

`decide` says what follows an attempt, on one machine (`run_attempts`) and in a SLURM job (`decide_in_job`) alike.
"""

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import FrameType

import typer

from rto_megatron.errors import RunFolderError
from rto_megatron.launching.torchrun import RankFailure, has_ranks, kill_ranks
from rto_megatron.lifecycle.ending import MEMORY_KNOBS, finished_steps
from rto_megatron.lifecycle.stacks import drop_empty
from rto_megatron.lifecycle.start_up import begin_launch
from rto_megatron.lifecycle.status import STACKS, ExitReason, Status, clear_status, read_status, write_status
from rto_megatron.lifecycle.stopping import STOP_FILE, Preempted
from rto_megatron.platform.whole_files import write_whole
from rto_megatron.storage.checkpoints import latest_checkpoint

# What may pass. Seeds are those of the step, so memory, disk and numbers would fail again in the same way.
_RETRIED = (
    ExitReason.INFRA_LOST_RANK,
    ExitReason.INFRA_NO_GENERATOR,
    ExitReason.INFRA_NO_REWARD,
    ExitReason.HANG,
    ExitReason.BUG,
)
ATTEMPTS_FILE = "attempts.json"  # <run>/attempts.json: what a job's next decision must know of those before
_MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")

Start = Callable[[], RankFailure | None]
Prepare = Callable[[int], bool]  # before an attempt, given its number; False: there is no use in it


class Stopping:
    """What the signals of a launch have asked for; see `listening`.

    Example:
        signal.signal(signal.SIGTERM, Stopping(run_dir).finish_step)
    """

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


class Next(StrEnum):
    """What follows an attempt."""

    AGAIN = "AGAIN"  # a fresh start from the last checkpoint
    REQUEUE = "REQUEUE"  # the job goes back into the scheduler's queue, since its time is up
    END = "END"


@dataclass(frozen=True)
class Tally:
    """What the decision on an attempt must know of those before it.

    Args:
        restarts_left: fresh starts until there is a new checkpoint.
        fingerprint: of the last crash; empty: there was none.
        checkpoint: name of the newest one when the attempt began; empty: there was none.

    Example:
        Tally(restarts_left=3, fingerprint="", checkpoint="step_000200")
    """

    restarts_left: int
    fingerprint: str
    checkpoint: str


@dataclass(frozen=True)
class Decision:
    """What follows an attempt, and how that attempt ended.

    Args:
        status: as the attempt left it, or REPEATED_CRASH.
        tally: for the decision on the next attempt.

    Example:
        Decision(Next.END, status, tally).is_out_of_restarts
    """

    next: Next
    status: Status
    tally: Tally

    @property
    def is_out_of_restarts(self) -> bool:
        """True if the run ends with a crash that may pass: it was not asked to stop, and no restart is left."""
        return self.next is Next.END and self.status.reason in _RETRIED


def decide(
    status: Status, checkpoint: str, tally: Tally, restarts: int, when_stopped: Next | None = None
) -> Decision:
    """Says what follows an attempt.

    Args:
        status: how the attempt ended.
        checkpoint: name of the newest one now; empty: there is none.
        tally: of the attempts before.
        restarts: fresh starts in a row without a new checkpoint.
        when_stopped: what follows an end that a stop has asked for; None: none did.
    """
    may_pass = status.reason in _RETRIED
    if when_stopped is not None and (may_pass or status.reason is ExitReason.PREEMPTED):
        return Decision(when_stopped, status, tally)
    if not may_pass:
        return Decision(Next.END, status, tally)
    has_progressed = checkpoint != tally.checkpoint
    if tally.fingerprint and status.fingerprint == tally.fingerprint and not has_progressed:
        repeated = f"crashed twice alike ({status.fingerprint}), so it is not started again: {status.message}"
        status = replace(status, reason=ExitReason.REPEATED_CRASH, message=repeated)
        return Decision(Next.END, status, tally)
    left = restarts if has_progressed else tally.restarts_left
    if left == 0:
        return Decision(Next.END, status, tally)
    return Decision(Next.AGAIN, status, Tally(left - 1, status.fingerprint, checkpoint))


def run_attempts(run_dir: Path, restarts: int, stopping: Stopping, prepare: Prepare, start: Start) -> Status:
    """Starts the ranks until the run has ended or is not to be started again.

    Args:
        restarts: how often in a row without a new checkpoint.
        prepare: makes the pool ready, before every attempt but the first.

    Returns:
        how it ended, which run_status.json says too.
    """
    tally = Tally(restarts, "", _newest(run_dir))
    for attempt in itertools.count(1):
        status = _attempt(run_dir, attempt, stopping, start)
        when_stopped = Next.END if stopping.is_asked else None
        decision = decide(status, _newest(run_dir), tally, restarts, when_stopped)
        status, tally = decision.status, decision.tally
        if decision.next is Next.END or not prepare(attempt + 1):
            break
        typer.echo(
            f"warning: attempt {attempt} ended after step {status.step} with {status.reason}: {status.message}\n"
            f"warning: starting attempt {attempt + 1}, {tally.restarts_left} more without a new checkpoint",
            err=True,
        )
    write_status(run_dir, status)
    return status


def decide_in_job(run_dir: Path, attempt: int, restarts: int, is_time_up: bool) -> Decision:
    """Decides as `run_attempts` does, once for each attempt of a job; the tally waits in the run folder meanwhile.

    Args:
        attempt: that has ended; 1 is the first of this start of the job.
        is_time_up: whether the scheduler told the job to stop; a stop that a person asked for ends the run.

    Returns:
        what follows; run_status.json says how the attempt ended.

    Raises:
        UserError: the tally of the attempts before is missing or damaged.
    """
    path = run_dir / ATTEMPTS_FILE
    # Of a first attempt any tally without a crash gives the same decision, whatever its checkpoint.
    tally = Tally(restarts, "", "") if attempt == 1 else _read_tally(path)
    nobody_lived = Status(
        ExitReason.INFRA_LOST_RANK, finished_steps(run_dir), "no rank could say why", attempt, "no status"
    )
    when_stopped = Next.REQUEUE if is_time_up else None
    decision = decide(read_status(run_dir) or nobody_lived, _newest(run_dir), tally, restarts, when_stopped)
    write_status(run_dir, decision.status)
    if decision.next is Next.AGAIN:
        write_whole(path, json.dumps(asdict(decision.tally), indent=2) + "\n")
    else:
        path.unlink(missing_ok=True)
    return decision


def _read_tally(path: Path) -> Tally:
    try:
        found = json.loads(path.read_text())
        return Tally(int(found["restarts_left"]), str(found["fingerprint"]), str(found["checkpoint"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path}: found no tally of the attempts before this one ({type(error).__name__}: {error}); expected what "
            "the decision on the last attempt wrote; submit the job again, which begins a new count"
        ) from error


def _newest(run_dir: Path) -> str:
    """Name of the newest checkpoint; empty: there is none."""
    checkpoint = latest_checkpoint(run_dir)
    return "" if checkpoint is None else checkpoint.name


def _attempt(run_dir: Path, attempt: int, stopping: Stopping, start: Start) -> Status:
    os.environ["RTO_ATTEMPT"] = str(attempt)
    if attempt > 1:
        begin_launch(is_first=False)
    clear_status(run_dir)
    kills = out_of_memory_kills()
    stopping.is_attempting = True
    try:
        failure = start()
    finally:
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
    """The status of a rank that could not say why it ended; the others saw only that it was gone.

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
    if name == "SIGABRT":
        message += "; on GPUs torch ends a rank so whose collective failed or took longer than run.collective_timeout_s"
    return Status(reason, step, message, attempt, message)


def out_of_memory_kills(events: Path = _MEMORY_EVENTS) -> int:
    """How often the kernel has ended a process of this control group for want of memory; 0 where it does not say."""
    if not events.exists():
        return 0
    counts = dict(line.split() for line in events.read_text().splitlines())
    return int(counts.get("oom_kill", "0"))
