"""One thing that the doctor found, and how a check that breaks becomes a finding too."""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rto_megatron.errors import UserError

Level = Literal["ok", "warning", "problem"]

# A check asks a machine that may be broken in any way. Whatever its libraries raise must not hide the other findings.
_BROKEN_MACHINE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    subprocess.SubprocessError,
)


@dataclass(frozen=True)
class Finding:
    """What was found; for a warning or a problem also why it matters and what to do.

    Args:
        where: the ranks that found it, with their machines; empty where there is one rank.

    Example:
        Finding("disk", "problem", "3 GB are free", why="a checkpoint takes 16", fix="make room")
    """

    check: str
    level: Level
    found: str
    why: str = ""
    fix: str = ""
    where: str = ""


def findings_of(name: str, check: Callable[[], Sequence[Finding]]) -> list[Finding]:
    """The findings of a check; an error of the user's is one, and so is a check that cannot be made."""
    try:
        return list(check())
    except UserError as error:
        return [Finding(name, "problem", str(error), "a stage would end with this message", "do as it says")]
    except _BROKEN_MACHINE as error:
        return [
            Finding(
                name,
                "problem",
                f"the check itself failed: {type(error).__name__}: {error}",
                "a part of the machine or of the environment that a run uses does not answer as it should",
                "mend what the error names, and run rto doctor again",
            )
        ]
