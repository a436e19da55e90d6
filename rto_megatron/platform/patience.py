"""Disks that are away for a moment, as network file systems are: what failed is tried again."""

import errno
import time
import warnings
from collections.abc import Callable

# What a network file system says while its server restarts or fails over. A full or read-only disk stays as it is.
_PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.EHOSTDOWN)
_PAUSES_S = (1.0, 4.0, 16.0)


def patiently[**P, R](action: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Does `action(*args, **kwargs)`, again after 1, 4 and 16 seconds where the disk's error may pass; warns each time.

    Args:
        action: may be done again after it failed half-way.

    Raises:
        OSError: one that does not pass by itself, or that did not pass.
    """
    for pause_s in _PAUSES_S:
        try:
            return action(*args, **kwargs)
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            where = f"{error.filename}: " if error.filename else ""
            warnings.warn(
                f"the disk failed, trying again in {pause_s:.0f} s: {where}{error.strerror}", stacklevel=2
            )
            time.sleep(pause_s)
    return action(*args, **kwargs)
