"""Processes that share a large piece of work on this machine, forked from this one."""

import ctypes
import os
import signal
import warnings
from collections.abc import Callable

_WORTHWHILE = 4 << 20  # bytes of rows for each process; tokenizing them takes seconds
_PR_SET_PDEATHSIG = 1


def num_workers(num_bytes: int, max_rows: int | None) -> int:
    """Processes that are worth starting: one where few rows are read, at most one a CPU of this process."""
    if max_rows is not None:
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), num_bytes // _WORTHWHILE))


def run_workers(work: Callable[[int], None], count: int) -> bool:
    """Runs work(0), work(1), ... each in a process of its own, and waits.

    The processes have this one's memory and run Python, jinja and tokenizers alone: no torch, no group, no device. They
    die with this one.

    Returns:
        False: one of them failed or was killed.
    """
    children = []
    for number in range(count):
        with warnings.catch_warnings():
            # Of threads of this process, whose locks the children do not touch.
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            _as_child(work, number)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return not any(statuses)


def _as_child(work: Callable[[int], None], number: int) -> None:
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, signal.SIG_DFL)  # the parent's handlers tell ranks to stop
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are the parent's
        work(number)
        status = 0
    finally:
        os._exit(status)
