"""Where the time from a launch to its first step goes, by part: what the launcher and a rank note on one clock.

The launcher hands what it noted to its ranks in their environment, and a rank goes on there. A part lasts until the
next one begins; parts of one name are added.
"""

import os
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

_VARIABLE = "RTO_START_UP"  # NAME=SECOND of the machine's clock, in the order in which parts began
_PHASES = ("push", "sample", "score", "update")  # of a step that samples


def begin_launch(is_first: bool = True) -> None:
    """Begins a launcher's account, of a first attempt from the first moment of this process on."""
    os.environ.pop(_VARIABLE, None)
    _note("launcher", process_start() if is_first else _now())


def begin_rank() -> None:
    """Goes on with the launcher's account, or begins one: from its first moment on this process imports."""
    _note("imports", process_start())


def begin_part(part: str) -> None:
    """Until the next one begins this process does `part`; does nothing where no account was begun, or it is told."""
    if _VARIABLE in os.environ:
        _note(part, _now())


def take_parts() -> dict[str, float]:
    """Part -> seconds, until now, and ends the account; empty: there was none, or it has ended."""
    notes = [note.rpartition("=") for note in os.environ.pop(_VARIABLE, "").split()]
    begun = [(part, float(second)) for part, _, second in notes] + [("", _now())]
    seconds: dict[str, float] = {}
    for (part, second), (_, end) in pairwise(begun):
        seconds[part] = seconds.get(part, 0.0) + end - second
    return seconds


def told_start(parts: Mapping[str, float], means: Mapping[str, float] | None = None) -> str:
    """A line about a start, for people.

    Args:
        parts: of `take_parts`.
        means: metrics of the step that was made first; None: there are no steps.
    """
    told = f"start-up {sum(parts.values()):.1f} s: {_listed(parts)}"
    if means is None:
        return told
    told += f"; first step {means['time/step_s']:.1f} s"
    phases = {phase: means[f"time/{phase}_s"] for phase in _PHASES if f"time/{phase}_s" in means}
    return f"{told}: {_listed(phases)}" if phases else told


def process_start() -> float:
    """When this process was started, on the clock of the notes."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


def _note(part: str, second: float) -> None:
    os.environ[_VARIABLE] = f"{os.environ.get(_VARIABLE, '')} {part}={second:.2f}".strip()


def _now() -> float:
    # Since the machine started, as the kernel counts when a process did.
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _listed(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
