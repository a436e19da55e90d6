"""A folder that is there whole or not at all: written aside, put on the disk, renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rto_megatron.errors import UserError


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """Yields a folder beside `target` that takes its name when the block ends well.

    What a killed conversion left is removed and made again; what a failed one leaves stays until then, to be looked at.

    Raises:
        UserError: `target` exists, or nothing can be written beside it.
    """
    require_absent(target)
    partial = target.with_name(f".partial_{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise _cannot_make(partial, error) from error
    yield partial
    for path in sorted(partial.rglob("*"), reverse=True):
        _sync(path)
    _sync(partial)
    require_absent(target)
    partial.rename(target)
    _sync(target.parent)


def require_absent(target: Path) -> None:
    """Raises UserError: there is something already, or there can be nothing."""
    try:
        is_there = target.exists() or target.is_symlink()
    except OSError as error:
        raise _cannot_make(target, error) from error
    if is_there:
        raise UserError(f"{target} exists already, and a conversion never overwrites; name a new folder")


def _cannot_make(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot make the folder {folder} ({error.strerror}); name another target")


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    os.fsync(opened)
    os.close(opened)
