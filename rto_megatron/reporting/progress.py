"""Progress of long parts: a rich bar on a terminal, one line per step elsewhere, silence on other ranks."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[str], None]  # call once per finished step, with a short note such as the loss


@contextmanager
def progress(title: str, total: int, is_lead: bool, done: int = 0) -> Iterator[Advance]:
    """Show the progress of `total` steps, of which `done` are finished already.

    Yields:
        A function to call after each step with a note ("loss 0.412"); it does nothing on other ranks.
    """
    if not is_lead:
        yield lambda note: None
    elif sys.stdout.isatty():
        with _bar() as bar:
            task = bar.add_task(title, total=total, completed=done, note="")
            yield lambda note: bar.update(task, advance=1, note=note)
    else:
        yield _line_printer(title, total, done)


def say(message: str, is_lead: bool) -> None:
    """Print one line for people, on the lead rank only."""
    if is_lead:
        Console().print(plain(message), markup=False, highlight=False, soft_wrap=True)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )


def _line_printer(title: str, total: int, done: int) -> Advance:
    start = time.monotonic()
    finished = done

    def advance(note: str) -> None:
        nonlocal finished
        finished += 1
        seconds = time.monotonic() - start
        left = seconds / (finished - done) * (total - finished)
        print(f"{title} {finished}/{total}  {seconds:.0f} s, {left:.0f} s left  {note}", flush=True)

    return advance


# Control characters but tab and line break, C1 among them, and marks that change the direction of the text.
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """`text` without what a terminal would take for a command."""
    return _COMMANDS.sub("", text)
