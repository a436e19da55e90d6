"""A folder that is there whole or not at all: written aside, put on the disk, renamed."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rto_megatron.errors import MachineError, RecipeError, UserError


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """Yields a folder beside `target` that takes its name when the block ends well.

    What a killed command left is removed and made again; what a failed one leaves stays until then, to be looked at.

    Raises:
        UserError: `target` exists, another process is making it, nothing can be written there, or the disk is full.
    """
    require_absent(target)
    partial = target.with_name(f".partial_{target.name}")
    with ExitStack() as stack:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(partial, target))
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        except OSError as error:
            raise _cannot_make(partial, error) from error
        try:
            yield partial
            for path in sorted(partial.rglob("*"), reverse=True):
                _sync(path)
            _sync(partial)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise MachineError(
                f"the disk of {target.parent} is full; free some or name another target"
            ) from error
        require_absent(target)
        partial.rename(target)
        _sync(target.parent)


def require_absent(target: Path) -> None:
    """Raises RecipeError: there is something already, or there can be nothing."""
    try:
        is_there = target.exists() or target.is_symlink()
    except OSError as error:
        raise _cannot_make(target, error) from error
    if is_there:
        raise RecipeError(
            f"{target} exists already and is never written over; name another one, or remove it first"
        )


def require_space(target: Path, nbytes: int) -> None:
    """Raises MachineError: the disk has less room than that."""
    parent = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.is_dir())
    usage = shutil.disk_usage(parent)
    if usage.total and usage.free < nbytes:  # some file systems do not say how large they are
        raise MachineError(
            f"the disk of {parent} has {usage.free / 1e9:.1f} GB free, and the weights take "
            f"{nbytes / 1e9:.1f} GB; free some or name another target"
        )


@contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """A lock on a folder that ends with this process, however it ends."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RecipeError(f"another process is writing {target}; wait for it, or name a new folder") from None
    finally:
        os.close(opened)


def _cannot_make(path: Path, error: OSError) -> UserError:
    return RecipeError(f"cannot make {path} ({error.strerror}); name another target")


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    os.fsync(opened)
    os.close(opened)
