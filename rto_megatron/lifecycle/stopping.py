"""A run that is told to stop finishes its step, saves and ends: the file STOP of its folder asks for it.

Anyone may touch the file: a scheduler's script, `rto launch`, a person. A rank that receives SIGTERM or SIGUSR1 touches
it too, so there is one thing to poll and every rank of every machine sees it.
"""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from rto_megatron.config.run_folder import make_run_folder
from rto_megatron.errors import UserError
from rto_megatron.lifecycle.status import ExitReason

STOP_FILE = "STOP"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


class Preempted(UserError):  # noqa: N818  (an end in order, told to the launcher like the others)
    """Raised on every rank together, after the step was saved."""

    reason = "PREEMPTED"


def is_asked_to_stop(run_dir: Path) -> bool:
    """True once someone touched the file; ranks must agree before they act on it."""
    return (run_dir / STOP_FILE).exists()


def forget_old_request(run_dir: Path) -> None:
    """Removes the request to an earlier run; one that came while this process was starting stays."""
    if is_asked_to_stop(run_dir) and not was_asked_since_start(run_dir):
        (run_dir / STOP_FILE).unlink(missing_ok=True)


def was_asked_since_start(run_dir: Path) -> bool:
    """True once someone touched the file after this process was started."""
    try:
        return (run_dir / STOP_FILE).stat().st_mtime >= float(psutil.Process().create_time())
    except FileNotFoundError:
        return False


@contextmanager
def signals_ask_to_stop(run_dir: Path) -> Iterator[None]:
    """While inside, the first SIGTERM or SIGUSR1 touches STOP and the second ends this process at once."""

    def ask(signum: int, frame: FrameType | None) -> None:
        for one in STOP_SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        (run_dir / STOP_FILE).touch()

    make_run_folder(run_dir)
    before = {one: signal.signal(one, ask) for one in STOP_SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def status_of_stopped_rank() -> int:
    """Exit status of a rank that was told to stop; torchrun takes any but 0 for a crash."""
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else ExitReason.PREEMPTED.exit_code


def die_with_parent() -> None:
    """Makes the kernel kill this rank when the agent that started it ends, even by SIGKILL.

    Does nothing outside torchrun: a rank that was started by hand may outlive its shell.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    # The agent may have ended before the call above; then nobody would send the signal any more.
    agent = os.environ.get("RTO_AGENT_PID")
    if os.getppid() == 1 or (agent is not None and os.getppid() != int(agent)):
        os.kill(os.getpid(), signal.SIGKILL)
