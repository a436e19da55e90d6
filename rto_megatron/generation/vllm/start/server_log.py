"""What a server prints, in a file: the file of the server before it is kept, and a failure's cause is found in it."""

import re
from collections.abc import Sequence
from pathlib import Path

_LINES_SHOWN = 15
_PREFIX = re.compile(r"^(\(\w+(?:_\w+)* pid=\d+\) )?(?:(ERROR|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]*\] )?")
_ENDS_TRACEBACK = re.compile(r"^[\w.]+(Error|Exception|Exit|Interrupt|Warning)?\b.*")
_FATAL = re.compile(r"^(Fatal Python error|terminate called|\S+: error:)|Bus error|Segmentation fault")
_TRACEBACK = "Traceback (most recent call last):"
_MORE_LINES = 3  # pydantic says what is wrong on the lines below the error's name
_LONGEST = 600


def keep_log_before(log_file: Path) -> None:
    """Makes place for a new log; one that is there becomes <name>.ended-<number>, the latest the highest."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    if not log_file.exists():
        return
    number = 1
    while (kept := log_file.with_name(f"{log_file.stem}.ended-{number}{log_file.suffix}")).exists():
        number += 1
    log_file.rename(kept)


def why_it_ended(log_file: Path) -> str:
    """The first error in a log, or the end of it, for a message."""
    lines = log_file.read_text(errors="replace").splitlines()
    if (cause := first_error(lines)) is not None:
        return f"the first error in {log_file}:\n  {cause}"
    shown = lines[-_LINES_SHOWN:] or ["(empty)"]
    return f"the last lines of {log_file}:\n  " + "\n  ".join(shown)


def first_error(lines: Sequence[str]) -> str | None:
    """The last line of the first traceback, or the first line of level ERROR; None: there is neither.

    Python prints the cause of an exception before the exception, and vLLM's engine its own before the server's
    "See root cause above", so the first one is the cause.
    """
    told = [_PREFIX.sub("", line) for line in lines]
    for number, line in enumerate(told):
        if line.startswith(_TRACEBACK):
            return _end_of_traceback(told[number + 1 :])
        if _FATAL.search(line):
            return line[:_LONGEST]
    levels = ((_PREFIX.match(line), text) for line, text in zip(lines, told, strict=True))
    return next((text[:_LONGEST] for match, text in levels if match and match.group(2)), None)


def _end_of_traceback(lines: Sequence[str]) -> str | None:
    for number, line in enumerate(lines):
        if line[:1] in ("", " ", "\t") or not _ENDS_TRACEBACK.match(line):
            continue
        more = []
        for one in lines[number + 1 : number + 1 + _MORE_LINES]:
            if not one.startswith("  ") or one.lstrip().startswith(("File ", "For further")):
                break
            more.append(one.strip())
        return " ".join([line, *more])[:_LONGEST]
    return None
