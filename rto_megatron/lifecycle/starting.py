"""A run that is told to stop before its first step ends at once: it has nothing to save, and may wait for a rank.

A rank that waits inside torch, for another rank or for a disk, runs no signal handler of Python's. A thread listens for
it: to the file to which Python notes signals as they come, and to STOP in the run folder.
"""

import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rto_megatron.lifecycle.ending import finished_steps
from rto_megatron.lifecycle.status import ExitReason, Status, attempt_number, note_status
from rto_megatron.lifecycle.stopping import (
    STOP_FILE,
    STOP_SIGNALS,
    status_of_stopped_rank,
    was_asked_since_start,
)

_POLL_S = 0.25
_NO_FILE = -1


@contextmanager
def ends_while_starting(run_dir: Path) -> Iterator[None]:
    """Until `begin_steps`, a stop signal or STOP ends this process at once, as PREEMPTED.

    For the main thread, where the stop signals have handlers of Python's.
    """
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    signal.set_wakeup_fd(mouth.detach(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(ear, run_dir), name="stop watch", daemon=True)
    watch.start()
    try:
        yield
    finally:
        begin_steps()
        watch.join()


def begin_steps() -> None:
    """From here on a stop waits for the end of the step. Ends the watch; does nothing where there is none."""
    mouth = signal.set_wakeup_fd(_NO_FILE)
    if mouth != _NO_FILE:
        os.close(mouth)


def _watch(ear: socket.socket, run_dir: Path) -> None:
    with ear:
        while not was_asked_since_start(run_dir):
            if not select.select([ear], [], [], _POLL_S)[0]:
                continue
            heard = ear.recv(64)
            if not heard:
                return
            if any(one in heard for one in STOP_SIGNALS):
                (run_dir / STOP_FILE).touch()  # for the other ranks
                break
    step = finished_steps(run_dir)
    told = f"told to stop after step {step}, while the run was starting; its checkpoints are as they were"
    note_status(run_dir, Status(ExitReason.PREEMPTED, step, told, attempt_number()))
    if os.environ.get("RANK", "0") == "0":
        print(told, file=sys.stderr, flush=True)
    os._exit(status_of_stopped_rank())
