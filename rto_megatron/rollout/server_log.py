"""What a server's log says of its end: the first error, before those that only report it."""

import re
from collections.abc import Sequence

_PREFIX = re.compile(r"^(\(\w+(?:_\w+)* pid=\d+\) )?(?:(ERROR|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]*\] )?")
_ENDS_TRACEBACK = re.compile(r"^[\w.]+(Error|Exception|Exit|Interrupt|Warning)?\b.*")
_FATAL = re.compile(r"^(Fatal Python error|terminate called|\S+: error:)|Bus error|Segmentation fault")
_TRACEBACK = "Traceback (most recent call last):"
_MORE_LINES = 3  # pydantic says what is wrong on the lines below the error's name
_LONGEST = 600


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
