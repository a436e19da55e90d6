"""Where every rank stood when one of them hung or crashed: <run>/stacks/attempt_A_rank_R.txt."""

import faulthandler
import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from rto_megatron.lifecycle.status import STACKS

_RANK_COMMAND = "rto_megatron.cli.main"


@contextmanager
def kept_stacks(run_dir: Path, rank: int, attempt: int) -> Iterator[None]:
    """While inside, a crash of the interpreter or SIGUSR2 writes this rank's stacks to its file.

    A file to which nothing was written is removed in the end.
    """
    path = stack_file(run_dir, rank, attempt)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR2, file, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR2)
            faulthandler.disable()
            if path.exists() and not path.stat().st_size:
                path.unlink(missing_ok=True)


def stack_file(run_dir: Path, rank: int, attempt: int) -> Path:
    """The file of one rank."""
    return run_dir / STACKS / f"attempt_{attempt}_rank_{rank}.txt"


def keep_all_stacks(run_dir: Path, rank: int, attempt: int, error: BaseException) -> list[str]:
    """After a collective ran out of time: keeps this rank's stack and asks the ranks of this machine for theirs.

    Ranks that are stopped are killed.

    Returns:
        one sentence for each rank that cannot answer, because it is stopped.
    """
    with stack_file(run_dir, rank, attempt).open("a") as file:
        file.write("".join(traceback.format_exception(error)))
    silent = []
    for process in other_ranks():
        other = int(process.environ()["RANK"])
        if process.status() == psutil.STATUS_STOPPED:
            note = f"rank {other} (process {process.pid}) is stopped by a signal, as by SIGSTOP, and runs no code"
            with stack_file(run_dir, other, attempt).open("a") as file:
                file.write(f"{note}; it cannot write its stack\n")
            process.kill()  # it could not end in order, and whoever waits for it waits for nothing
            silent.append(note)
        else:
            process.send_signal(signal.SIGUSR2)
    return silent


def drop_empty(run_dir: Path) -> None:
    """Removes the files of ranks that were killed before they wrote anything."""
    for path in (run_dir / STACKS).glob("*.txt"):
        if not path.stat().st_size:
            path.unlink()


def other_ranks() -> list[psutil.Process]:
    """The ranks that this rank's agent started besides; none without an agent."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    return [p for p in ranks_of(psutil.Process(os.getppid())) if p.pid != os.getpid()]


def ranks_of(agent: psutil.Process) -> list[psutil.Process]:
    """The ranks among the processes that `agent` started and that still run."""
    return [p for p in agent.children() if _is_rank(p)]


def _is_rank(process: psutil.Process) -> bool:
    try:
        return _RANK_COMMAND in process.cmdline() and "RANK" in process.environ()
    except psutil.Error:  # it has just ended
        return False
