"""Open files of this process: every connection is one, and the limit of them is the machine's, not a server's fault."""

import errno
import os
import resource
from collections.abc import Iterator

from rto_megatron.errors import MachineError

_MOST = 1 << 20  # Linux's own ceiling; a hard limit can be unlimited, which it would refuse as a soft one
_KEPT_BACK = 64  # for checkpoints, logs and the sockets of a weight push
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
_ADVICE = "raise the hard limit (ulimit -Hn; LimitNOFILE= of a service, --ulimit nofile= of a container)"


class TooManyOpenFiles(MachineError):  # noqa: N818  (a state of this machine, told like a user's error)
    """This process, or the machine, may open no more files."""


def raise_file_limit() -> int:
    """Raises the soft limit of open files to the hard one, for this process and those that it starts; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft


def connections_left(num_servers: int) -> int:
    """How many requests may be under way at once within the limit of open files.

    Raises:
        TooManyOpenFiles: none.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST
    is_open = len(os.listdir("/proc/self/fd"))
    # Probes take up to two each, and a connection that idles to one server stays open while another is asked.
    left = (soft - is_open - _KEPT_BACK - 2 * num_servers) // 2
    if left < 1:
        raise TooManyOpenFiles(
            f"{is_open} files are open and the limit is {soft}, which leaves none for requests to {num_servers} "
            f"inference servers; {_ADVICE}"
        )
    return left


def refuse_if_out_of_files(error: BaseException) -> None:
    """Does nothing where an error of a connection has another cause.

    Raises:
        TooManyOpenFiles: this process could not open a socket, or a file to look up a name.
    """
    # A look-up of a name hides the cause; then another file cannot be opened either.
    if any(one.errno in _OUT_OF_FILES for one in _causes(error) if isinstance(one, OSError)) or _is_full():
        raise TooManyOpenFiles(
            f"this process may open no more files ({error}); the limit of ulimit -n is "
            f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]}; {_ADVICE}"
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_full() -> bool:
    try:
        os.close(os.open("/dev/null", os.O_RDONLY))
    except OSError as error:
        return error.errno in _OUT_OF_FILES
    return False
