"""Whether a checkpoint is whole, and what goes wrong with the disk under it: told on all ranks together."""

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rto_megatron.errors import UserError
from rto_megatron.storage.file_digests import first_problem

if TYPE_CHECKING:  # a launcher reads run folders, and does without Megatron
    from rto_megatron.parallel.topology import Topology

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAKE_ROOM = "Make room (or lower run.keep_checkpoints), and start the run again"


class CheckpointError(UserError):
    """A checkpoint cannot be written, or is not what was written."""

    reason = "CHECKPOINT"


class DiskFull(CheckpointError):  # noqa: N818  (a state, named for what it is)
    """No room for a checkpoint."""

    reason = "DISK"


SAVING_ERRORS = (DiskFull, CheckpointError)  # for `Topology.raise_together`


def write_error(error: OSError, partial: Path, num_bytes: int) -> CheckpointError:
    """What a failed write says to the user.

    Args:
        partial: where the checkpoint was being written.
        num_bytes: of the whole checkpoint.
    """
    kept = "older checkpoints are as they were"
    where = error.filename or partial
    if error.errno not in _FULL:
        return CheckpointError(
            f"the checkpoint cannot be written: {where}: {error.strerror}; {kept}. Make {partial.parent} writable and "
            "start the run again"
        )
    return DiskFull(
        f"the disk is full: {where}: {error.strerror}; the checkpoint needs {num_bytes} bytes, and "
        f"{_free_bytes(partial.parent)} are free in {partial.parent}; {kept}. {_MAKE_ROOM}"
    )


def room_error(folder: Path, num_bytes: int) -> DiskFull | None:
    """Whether `folder` has no room for so many bytes."""
    free = _free_bytes(folder)
    if free >= num_bytes:
        return None
    return DiskFull(
        f"{folder} has no room for a checkpoint: it needs {num_bytes} bytes, and {free} are free; no weight was "
        f"written. {_MAKE_ROOM}"
    )


def _free_bytes(folder: Path) -> int:
    try:
        disk = os.statvfs(folder)
    except OSError:  # it vanished, which is the error that is being reported
        return 0
    return disk.f_bavail * disk.f_frsize


def require_intact(role: Path, topology: "Topology") -> None:
    """Reads every file of <checkpoint>/<role> once, shared out over the ranks; all ranks must call it.

    Raises:
        CheckpointError: on every rank, when a file is missing, cut short or changed; names it.
    """
    problem = first_problem(role, topology.rank, topology.world_size)
    topology.raise_together(None if problem is None else CheckpointError(problem), CheckpointError)
