"""Faults on purpose, at named places of a run: how the ways in which a run survives are tested.

RTO_FAULT="site:step:rank:kind[,...]" is the plan; steps count from 1, as in the names of checkpoints. Each fault adds
its line to the file RTO_FAULT_LOG before it fires and fires as often as the plan names it, restarts included. Without
the variable nothing happens.
"""

import ctypes
import errno
import os
import signal
from pathlib import Path

from rto_megatron.errors import MachineError

SITES = (
    "before_gen",
    "in_gen",
    "after_gen",
    "logprob",
    "fwd_bwd",
    "opt_step",
    "ckpt_shard",
    "ckpt_manifest",
    "ckpt_rename",
    "ckpt_pointer",
)
KINDS = ("kill", "stop", "exit17", "raise", "oom", "nan", "disk", "stale", "segfault")
_EXIT_STATUS = 17


class InjectedFault(RuntimeError):  # noqa: N818  (raised on purpose, nobody handles it)
    """Stands for a bug: an error that no code expects."""


def are_planned() -> bool:
    """Whether this process has a plan of faults."""
    return bool(os.environ.get("RTO_FAULT"))


def at(site: str, step: int) -> bool:
    """Fires what the plan has for this place, step and rank.

    Args:
        step: the one that is being made or saved, from 1.

    Returns:
        True where the caller must poison its own value with a NaN.

    Raises:
        InjectedFault, MemoryError, OSError: the kinds raise, oom, disk and stale.
        UserError: the plan cannot be read.
    """
    plan = os.environ.get("RTO_FAULT")
    if not plan:
        return False
    place = f"{site}:{step}:{os.environ.get('RANK', '0')}:"
    due = [fault for fault in _faults(plan) if fault.startswith(place)]
    log = _log_file()
    for fault in due:
        fired = log.read_text().splitlines() if log.exists() else []
        if fired.count(fault) < due.count(fault):
            _note(log, fault)
            return _fire(fault.removeprefix(place), fault)
    return False


def _faults(plan: str) -> list[str]:
    faults = [fault.strip() for fault in plan.split(",")]
    for fault in faults:
        site, step, rank, kind = (*fault.split(":"), "", "", "")[:4]
        if site not in SITES or kind not in KINDS or not (step.isdigit() and rank.isdigit()):
            raise MachineError(
                f"RTO_FAULT: {fault!r} is not site:step:rank:kind with a site of {', '.join(SITES)} and a kind of "
                f"{', '.join(KINDS)}"
            )
    return faults


def _log_file() -> Path:
    path = os.environ.get("RTO_FAULT_LOG")
    if not path:
        raise MachineError("RTO_FAULT needs RTO_FAULT_LOG, a file that remembers what fired; name one")
    return Path(path)


def _note(log: Path, fault: str) -> None:
    with log.open("a") as file:
        file.write(f"{fault}\n")
        file.flush()
        os.fsync(file.fileno())  # some kinds end the process with the next call


def _fire(kind: str, fault: str) -> bool:
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit17":
            os._exit(_EXIT_STATUS)
        case "segfault":
            ctypes.string_at(0)
        case "raise":
            raise InjectedFault(f"injected fault {fault}")
        case "oom":
            raise MemoryError(f"injected fault {fault}")
        case "disk":
            raise OSError(errno.ENOSPC, f"injected fault {fault}")
        case "stale":
            raise OSError(errno.ESTALE, f"injected fault {fault}")
    return kind == "nan"
