"""What of a machine and its environment ends a vLLM server before it serves, and what is done about it."""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_MIB = 1 << 20
_QUEUE_BYTES = 240 * _MIB  # of a worker of several: vLLM refuses to start with less shared memory
_LONGEST_SOCKET = 107  # bytes of a path, Linux's sockaddr_un
_SOCKET_NAME = 37  # vLLM's own: a slash and a uuid
_SHORT_FOLDER = "/tmp"
PORT = "VLLM_PORT"
SOCKETS = "VLLM_RPC_BASE_PATH"


def mended(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The environment with what would end a server made right, and a sentence on each change.

    Args:
        environment: of this process, which servers inherit.
    """
    changed, said = dict(environment), []
    port = environment.get(PORT, "0")
    if not port.isdigit():
        del changed[PORT]
        said.append(
            f"{PORT}={port} is not given to the servers: Kubernetes sets it for a service named vllm, and vLLM would "
            "take it for a port number"
        )
    folder = tempfile.gettempdir()
    if SOCKETS not in environment and is_too_long(folder):
        changed[SOCKETS] = _SHORT_FOLDER
        said.append(
            f"the folder for temporary files, {folder}, is too long for the sockets of a server, whose paths end at "
            f"{_LONGEST_SOCKET} bytes; they are made in {_SHORT_FOLDER} ({SOCKETS})"
        )
    return changed, said


def is_too_long(folder: str) -> bool:
    """Whether vLLM's sockets in this folder would have longer paths than Linux allows."""
    return len(os.fsencode(folder)) + _SOCKET_NAME > _LONGEST_SOCKET


def environment_problems(
    tensor_sizes: Sequence[int], environment: Mapping[str, str], shared_memory: Path = Path("/dev/shm")
) -> list[str]:
    """Why servers of these tensor-parallel sizes would not start here, one sentence each."""
    problems = []
    sockets = environment.get(SOCKETS)
    if sockets is not None and is_too_long(sockets):
        problems.append(
            f"{SOCKETS}={sockets} is too long: a server's sockets in it would have paths of more than "
            f"{_LONGEST_SOCKET} bytes; name a folder of at most {_LONGEST_SOCKET - _SOCKET_NAME}, or unset it"
        )
    free = shutil.disk_usage(shared_memory).free
    if max(tensor_sizes) > 1 and free < _QUEUE_BYTES:
        problems.append(
            f"{shared_memory} has {free // _MIB} MiB free, and a server with tensor parallelism does not start with "
            f"less than {_QUEUE_BYTES // _MIB}; docker run --ipc=host or --shm-size=16g, an emptyDir of medium Memory "
            "in Kubernetes, or mount -o remount,size=16g /dev/shm"
        )
    return problems
