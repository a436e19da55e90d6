"""One run in a folder at a time: `<run>/run.lock`, made exclusively, says who writes there and that he lives.

A lock goes to the next attempt of the same SLURM job at once, and to anybody once its holder is gone: its process has
ended on this machine, or it gave no beat for a while. A beat sets the file's modification time. Ages are differences
between times that the folder's file system gave, as clocks of machines differ; and as its clock may jump too, who finds
a lock old watches it before taking it.
"""

import json
import os
import secrets
import shlex
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rto_megatron.config.run_folder import make_run_folder, missing_folders
from rto_megatron.errors import RunFolderError, UserError
from rto_megatron.lifecycle.status import attempt_number, drop_refused
from rto_megatron.lifecycle.stopping import STOP_FILE
from rto_megatron.reporting.progress import say

LOCK_FILE = "run.lock"
LAUNCH_VARIABLE = "RTO_LAUNCH"  # names to its ranks the launch that holds their folder
_POLL_S = 0.5
_MOST_TRIES = 5  # against others who try at the same time


@dataclass(frozen=True)
class Heartbeat:
    """Seconds.

    Args:
        beat: between two beats of a holder.
        gone: without a beat, after which a holder may be gone.
        watch: in which a holder who lives must beat.

    Example:
        Heartbeat(beat=1.0, gone=10.0, watch=3.0)
    """

    beat: float = 15.0
    gone: float = 180.0
    watch: float = 35.0


@dataclass(frozen=True)
class Holder:
    """Who holds a folder.

    Args:
        owner: of the lock; the launch, whose ranks are at home in the folder.
        process: its number, which means something in its namespace of one boot of one machine.
        ticks: when the process started, in the kernel's count: numbers of processes are used again.
        job: of SLURM; empty outside.
        turn: how often the job was queued again, and the attempt.
        start: for people.

    Example:
        print(holder.host, holder.process, holder.job)
    """

    owner: str
    host: str
    boot: str
    namespace: str
    process: int
    ticks: int
    job: str
    turn: tuple[int, int]
    start: str

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.process} of {self.host}{job}, since {self.start}"


@contextmanager
def held(run_dir: Path, pace: Heartbeat = Heartbeat()) -> Iterator[str]:
    """Holds the folder while inside; yields the owner of the lock, for `LAUNCH_VARIABLE`.

    A folder that is not there is made, and goes again where the run was refused before it left anything in it.

    Raises:
        RunFolderError: another run holds it, or it cannot be written.
    """
    me, missing = _myself(), missing_folders(run_dir)
    path = run_dir / LOCK_FILE
    try:
        make_run_folder(run_dir)
        _take(path, me, pace)
    except (FileExistsError, NotADirectoryError) as error:
        taken = next(one for one in (run_dir, *run_dir.parents) if one.exists())
        raise RunFolderError(
            f"{run_dir}: {taken} is a file; expected the name of a folder to write; take another one"
        ) from error
    except OSError as error:
        raise RunFolderError(
            f"{run_dir} cannot be written ({error.strerror}); name another folder"
        ) from error
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, me, pace, ended), name="run lock", daemon=True)
    beating.start()
    try:
        yield me.owner
    finally:
        ended.set()
        beating.join()
        if _read(path) == me:
            path.unlink(missing_ok=True)
        drop_refused(run_dir, missing)


@contextmanager
def held_by_rank(run_dir: Path) -> Iterator[None]:
    """`held` for a rank: the lead holds the folder, unless its launch does; the others ask whether it is free.

    Raises:
        UserError: on every rank; another run holds it.
    """
    holder = _read(run_dir / LOCK_FILE)
    if holder is not None and holder.owner == os.environ.get(LAUNCH_VARIABLE):
        yield
    elif os.environ.get("RANK", "0") == "0":
        with held(run_dir):
            yield
    else:
        if holder is None or holder.owner != _myself().owner:
            require_free(run_dir)
        yield


def require_free(run_dir: Path) -> None:
    """Changes nothing.

    Raises:
        UserError: another run holds the folder.
    """
    path = run_dir / LOCK_FILE
    found = _read(path)
    if path.exists() and not _may_take(path, found, _myself(), Heartbeat(watch=0.0)):
        raise _refusal(path, found)


def require_no_other(run_dir: Path) -> None:
    """For what a job runs beside its ranks, whose lock may be there; changes nothing.

    Raises:
        UserError: another run holds the folder, so that what it says is not of this job's.
    """
    found, own = _read(run_dir / LOCK_FILE), _myself().job
    if not own or found is None or found.job != own:
        require_free(run_dir)


def _myself() -> Holder:
    job = os.environ.get("SLURM_JOB_ID", "")
    # The ranks of a job share its meeting point, and no other job that runs has it.
    meeting = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    return Holder(
        owner=meeting if os.environ.get("WORLD_SIZE", "1") != "1" else secrets.token_hex(16),
        host=socket.gethostname(),
        boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        namespace=str(Path("/proc/self/ns/pid").readlink()),
        process=os.getpid(),
        ticks=_ticks(os.getpid()) or 0,
        job=f"{job} of {os.environ.get('SLURM_CLUSTER_NAME', 'this cluster')}" if job else "",
        turn=(int(os.environ.get("SLURM_RESTART_COUNT", "0")), attempt_number()),
        start=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _take(path: Path, me: Holder, pace: Heartbeat) -> None:
    for _ in range(_MOST_TRIES):
        try:
            _create(path, me)
            return
        except FileExistsError:
            found = _read(path)
        if not _may_take(path, found, me, pace):
            break
        _put_aside(path, found)
    raise _refusal(path, found)


def _create(path: Path, me: Holder) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(me), indent=2) + "\n")
        file.flush()
        os.fsync(descriptor)


def _read(path: Path) -> Holder | None:
    """None where there is no lock, or one that does not say yet who holds it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Holder(**{**found, "turn": tuple(found["turn"])})
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return None


def _may_take(path: Path, found: Holder | None, me: Holder, pace: Heartbeat) -> bool:
    """Whether the holder is gone, or gives way as an earlier attempt of the same job."""
    if found is not None:
        if found.job and found.job == me.job and found.turn < me.turn:
            return True
        lives = _lives(found, me)
        if lives is not None:
            return not lives
    return _is_silent(path, pace)


def _lives(found: Holder, me: Holder) -> bool | None:
    """Whether the holder's process runs; None: it cannot be seen from here."""
    if (found.boot, found.namespace) != (me.boot, me.namespace):
        return None
    try:
        os.kill(found.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return None
    return _ticks(found.process) == found.ticks


def _ticks(process: int) -> int | None:
    """When a process started, in the kernel's ticks since the machine did; None: it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _is_silent(path: Path, pace: Heartbeat) -> bool:
    try:
        last = path.stat().st_mtime_ns
        if _age(path) < pace.gone:
            return False
        until = time.monotonic() + pace.watch
        say(f"{path} is old; its holder is gone if it gives no beat in {pace.watch:.0f} s", pace.watch > 0)
        while time.monotonic() < until:
            time.sleep(min(_POLL_S, pace.watch))
            if path.stat().st_mtime_ns != last:
                return False
    except FileNotFoundError:  # given back meanwhile
        return True
    return True


def _age(path: Path) -> float:
    """Seconds since the last beat, by the clock of the file system."""
    with tempfile.TemporaryFile(dir=path.parent) as now, path.open() as lock:
        now.write(b".")
        now.flush()
        return os.fstat(now.fileno()).st_mtime - os.fstat(lock.fileno()).st_mtime


def _put_aside(path: Path, found: Holder | None) -> None:
    """Removes the lock of `found`, and no other: somebody may have taken it over before."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.rename(aside)
        if _read(aside) != found:
            os.link(aside, path)
    except (FileNotFoundError, FileExistsError):
        pass
    aside.unlink(missing_ok=True)


def _refusal(path: Path, found: Holder | None) -> UserError:
    who = found or "a process that has not said who it is"
    stop = shlex.quote(str(path.with_name(STOP_FILE)))
    return RunFolderError(
        f"{path.parent} is in use: {who}. Two runs in one folder would mix their metrics and checkpoints: name another "
        f"run.dir, or end that run first (`touch {stop}` makes it save and end). If it is gone for certain, remove "
        f"{shlex.quote(str(path))}"
    )


def _beat(path: Path, me: Holder, pace: Heartbeat, ended: threading.Event) -> None:
    while not ended.wait(pace.beat):
        try:
            found = _read(path)
            if found == me:
                os.utime(path)
            elif found is not None:
                _end_at_once(path, found)
            elif not path.exists():  # removed by hand, but nobody else has come
                _create(path, me)
        except OSError:  # the disk is away, or somebody was faster: the next beat sees
            continue


def _end_at_once(path: Path, found: Holder) -> None:
    """Ends a holder that was silent for so long that another run began: both must not write."""
    print(f"error: {path.parent} was taken over: {found}. This run ends at once", file=sys.stderr, flush=True)
    os._exit(1)
