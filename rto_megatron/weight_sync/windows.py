"""Memory that another process on this machine can read: on a GPU by CUDA IPC, else an anonymous file.

The file has no name anywhere, so that nothing is left behind however a process ends, and a container's limit
on /dev/shm does not apply; its reader opens it through /proc, as the same user.
"""

import json
import mmap
import os
import weakref
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

type IpcHandle = tuple[bytes | int | bool, ...]


class Window(Protocol):
    """Shared memory of this process, shared for as long as this object lives."""

    memory: Tensor  # uint8

    def handle(self) -> str:
        """What one other process needs to open it; ask once for each."""
        ...


class HostWindow:
    """Host memory."""

    def __init__(self, num_bytes: int) -> None:
        self._file = os.memfd_create("rto-window", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        os.ftruncate(self._file, num_bytes)
        self.memory = _mapped(self._file, num_bytes)

    def handle(self) -> str:
        """Process, file and, to recognise it, its inode."""
        return json.dumps([os.getpid(), self._file, os.fstat(self._file).st_ino])


class DeviceWindow:
    """Memory of one GPU."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def handle(self) -> str:
        """What torch needs; it counts the users of every handle that it gives out."""
        return ipc_text(self.memory.untyped_storage()._share_cuda_())


def open_window(handle: str, device: torch.device) -> Tensor:
    """The memory of another process's window, uint8; on the same device where that is a GPU.

    Raises:
        RuntimeError: it is gone, or belongs to another user.
    """
    if device.type == "cuda":
        # The number of a device differs between processes that see different devices; ours counts here.
        _, *rest = ipc_handle(handle)
        torch.cuda.init()
        storage = torch.UntypedStorage._new_shared_cuda(torch.device(device).index or 0, *rest)
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    process, file, inode = json.loads(handle)
    path = Path(f"/proc/{process}/fd/{file}")
    try:
        opened = os.open(path, os.O_RDWR)
    except OSError as error:
        raise RuntimeError(f"cannot open the memory that process {process} shares: {error}") from None
    try:
        found = os.fstat(opened)
        if found.st_ino != inode:
            raise RuntimeError(f"{path} is another file than process {process} shared")
        return _mapped(opened, found.st_size)
    finally:
        os.close(opened)


def _mapped(file: int, num_bytes: int) -> Tensor:
    # The tensor keeps the mapping, and the mapping the memory.
    return torch.frombuffer(mmap.mmap(file, num_bytes), dtype=torch.uint8)


def ipc_text(handle: IpcHandle) -> str:
    """A CUDA IPC handle as text: bytes in hexadecimal, numbers as they are."""
    return json.dumps([entry.hex() if isinstance(entry, bytes) else entry for entry in handle])


def ipc_handle(text: str) -> IpcHandle:
    """Reads `ipc_text`."""
    return tuple(bytes.fromhex(entry) if isinstance(entry, str) else entry for entry in json.loads(text))


def place_of(device: torch.device) -> str:
    """Names the memory that `device` can share: equal for two processes that can, on whatever machine they are."""
    if device.type == "cuda":
        return f"GPU {torch.cuda.get_device_properties(device).uuid}"
    # The reader finds the file by the number of its process, which names one process in one namespace only.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"machine {boot}, processes {Path('/proc/self/ns/pid').stat().st_ino}"
