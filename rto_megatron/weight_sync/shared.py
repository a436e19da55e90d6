"""The wire of a pool that shares the trainer's devices: each worker reads buckets from a trainer rank's staging buffer.

A staging buffer is two slots of the largest bucket's size, however large. It is where the trainer rank packs and
receives its buckets, so that sharing costs no copy on that side. Trainer ranks form a group of their own, over
which every bucket reaches every staging buffer that is read; a worker reads that of its partner, a trainer rank
on the same device. The store says which bucket is ready and who has read it: a broadcast ends for a trainer
rank when all readers of its staging buffer are done, and only then may the slot be filled again.
"""

import json
import mmap
import os
import socket
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rto_megatron.weight_sync.control_channel import ControlChannel, InFlight, TransportError
from rto_megatron.weight_sync.transport import Communicator, NetworkWire, Rendezvous, network

_NUM_SLOTS = 2
_ALIGNMENT = 512  # bytes


def shared(channel: ControlChannel, meeting: Rendezvous, device: torch.device) -> "TrainerWire | WorkerWire":
    """This rank's end of the wire between trainer and pool on the same devices."""
    if channel.rank < meeting.num_senders:
        return TrainerWire(channel, meeting, device)
    return WorkerWire(channel, meeting, device)


def partners(memories: Sequence[str], num_senders: int) -> dict[int, int]:
    """Worker -> the trainer rank from whose staging buffer it reads: one with the same memory, evenly shared out.

    Args:
        memories: of all ranks, the trainer's first.

    Raises:
        TransportError: a worker has none.
    """
    num_readers = [0] * num_senders
    found = {}
    for worker in range(num_senders, len(memories)):
        candidates = [rank for rank in range(num_senders) if memories[rank] == memories[worker]]
        if not candidates:
            raise TransportError(
                f"rollout.colocated: worker {worker - num_senders} of the pool is on {memories[worker]}, where no "
                f"trainer rank is; they are on {', '.join(dict.fromkeys(memories[:num_senders]))}. Place every "
                "server on the trainer's devices, or set rollout.colocated=false"
            )
        partner = min(candidates, key=lambda rank: num_readers[rank])
        num_readers[partner] += 1
        found[worker] = partner
    return found


class TrainerWire:
    """A trainer rank's end; see `transport.Wire`.

    Example:
        TrainerWire(channel, meeting, device).send_buffers(num_bytes=2**28)
    """

    def __init__(self, channel: ControlChannel, meeting: Rendezvous, device: torch.device) -> None:
        self.memory = memory_of(device)
        self._channel = channel
        self._num_senders = meeting.num_senders
        self._device = device
        self._among_trainers: NetworkWire | None = None
        if meeting.num_senders > 1:
            self._among_trainers = NetworkWire(
                channel, replace(meeting, world_size=meeting.num_senders), meeting.num_senders, device
            )
        self._readers: tuple[int, ...] = ()
        self._staging: StagingBuffer | None = None
        self._num_started = 0

    def join(self, memories: list[str]) -> None:
        """Finds the partners and makes the trainer ranks' group."""
        found = partners(memories, self._num_senders)
        self._readers = tuple(worker for worker, partner in found.items() if partner == self._channel.rank)
        if self._among_trainers is not None:
            self._among_trainers.join(memories)

    def give_up(self) -> None:
        """Ends what the trainer ranks send each other."""
        if self._among_trainers is not None:
            self._among_trainers.give_up()

    def send_buffers(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        """The staging buffer's slots; tells its readers where it is."""
        assert self._staging is None, "a sender asks for its buffers once"
        slot_bytes = max(1, -(-num_bytes // _ALIGNMENT)) * _ALIGNMENT
        on_gpu = self._device.type == "cuda"
        size = _NUM_SLOTS * slot_bytes
        self._staging = DeviceStagingBuffer(size, self._device) if on_gpu else HostStagingBuffer(size)
        for reader in self._readers:
            self._channel.say(_staging_key(reader), json.dumps([slot_bytes, self._staging.handle()]))
        first, second = self._staging.memory.split(slot_bytes)
        return first[:num_bytes], second[:num_bytes]

    def start(self, buffer: Tensor, source: int) -> InFlight:
        """Fills the slot, from another trainer rank if need be, and tells the readers."""
        assert self._staging is not None
        starts = [slot.data_ptr() for slot in self._staging.memory.chunk(_NUM_SLOTS)]
        assert buffer.data_ptr() in starts, "a sender broadcasts from its staging buffer"
        if self._among_trainers is not None:
            in_flight = self._among_trainers.start(buffer, source)
            self._channel.wait_for(in_flight, source, self._channel.deadline())
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        number, self._num_started = self._num_started, self._num_started + 1
        for reader in self._readers:
            self._channel.say(_ready_key(reader, number), str(starts.index(buffer.data_ptr())))
        return _Offered(self._channel, self._readers, number)


@dataclass(frozen=True)
class _Offered:
    """A bucket in a trainer rank's staging buffer."""

    channel: ControlChannel
    readers: tuple[int, ...]
    number: int

    def is_completed(self) -> bool:
        return self.channel.are_said([_done_key(reader, self.number) for reader in self.readers])

    def wait(self) -> None:
        # A run would pile them up in the store.
        for reader in self.readers:
            self.channel.forget([_ready_key(reader, self.number), _done_key(reader, self.number)])


class WorkerWire:
    """A worker's end; see `transport.Wire`.

    Example:
        slot = WorkerWire(channel, meeting, device).slot(0)
    """

    def __init__(self, channel: ControlChannel, meeting: Rendezvous, device: torch.device) -> None:
        self.memory = memory_of(device)
        self._channel = channel
        self._num_senders = meeting.num_senders
        self._device = device
        self._slots: tuple[Tensor, ...] = ()
        self._num_started = 0

    def join(self, memories: list[str]) -> None:
        """Makes sure that there is a partner; its staging buffer comes with the first bucket, which has the size."""
        partners(memories, self._num_senders)

    def give_up(self) -> None:
        """Nobody waits for a worker but through the store."""

    def send_buffers(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        """Workers send nothing."""
        raise AssertionError("a worker has nothing to send")

    def start(self, buffer: Tensor, source: int) -> InFlight:
        """Awaits a bucket of the partner's."""
        number, self._num_started = self._num_started, self._num_started + 1
        return _Awaited(self, self._channel, buffer, number)

    def slot(self, number: int) -> Tensor:
        """The slot of the partner's staging buffer that holds a bucket which is ready."""
        if not self._slots:
            # A staging buffer is made known before its first bucket is.
            slot_bytes, handle = json.loads(self._channel.hear(_staging_key(self._channel.rank)))
            self._slots = open_staging_buffer(handle, self._device).split(slot_bytes)
        return self._slots[int(self._channel.hear(_ready_key(self._channel.rank, number)))]

    def leave(self, number: int) -> None:
        """Tells the partner that a bucket was read."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._channel.say(_done_key(self._channel.rank, number))


@dataclass(frozen=True)
class _Awaited:
    """A bucket that a worker will read into its buffer."""

    wire: WorkerWire
    channel: ControlChannel
    buffer: Tensor
    number: int

    def is_completed(self) -> bool:
        return self.channel.are_said([_ready_key(self.channel.rank, self.number)])

    def wait(self) -> None:
        self.buffer.copy_(self.wire.slot(self.number)[: self.buffer.numel()])
        self.wire.leave(self.number)


def _staging_key(reader: int) -> str:
    return f"staging/{reader}"


def _ready_key(reader: int, number: int) -> str:
    return f"ready/{reader}/{number}"


def _done_key(reader: int, number: int) -> str:
    return f"done/{reader}/{number}"


type IpcHandle = tuple[bytes | int | bool, ...]


class StagingBuffer(Protocol):
    """Shared memory of this process, shared for as long as this object lives.

    Example:
        other_end.open(staging.handle())
    """

    memory: Tensor  # uint8

    def handle(self) -> str:
        """What one other process needs to open it; ask once for each."""
        ...


class HostStagingBuffer:
    """Host memory.

    Example:
        HostStagingBuffer(num_bytes=4096).handle()
    """

    def __init__(self, num_bytes: int) -> None:
        self._file = os.memfd_create("rto-staging", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        os.ftruncate(self._file, num_bytes)
        self.memory = _mapped(self._file, num_bytes)

    def handle(self) -> str:
        """Process, file and, to recognise it, its inode."""
        return json.dumps([os.getpid(), self._file, os.fstat(self._file).st_ino])


class DeviceStagingBuffer:
    """Memory of one GPU.

    Example:
        DeviceStagingBuffer(num_bytes=2**28, device=device).handle()
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def handle(self) -> str:
        """What torch needs; it counts the users of every handle that it gives out."""
        return ipc_text(self.memory.untyped_storage()._share_cuda_())


def open_staging_buffer(handle: str, device: torch.device) -> Tensor:
    """The memory of another process's staging buffer, uint8; on the same device where that is a GPU.

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


def memory_of(device: torch.device) -> str:
    """Names the memory that `device` can share: equal for two processes that can, on whatever machine they are."""
    if device.type == "cuda":
        return f"GPU {torch.cuda.get_device_properties(device).uuid}"
    # The reader finds the file by the number of its process, which names one process in one namespace only.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"machine {boot}, processes {Path('/proc/self/ns/pid').stat().st_ino}"


# (meeting, rank, device of the wire, listener of rank 0) -> an end that has not joined
OpenEnd = Callable[[Rendezvous, int, torch.device, socket.socket | None], Communicator]
_WIRES = {"network": network, "shared": shared}


def open_communicator(
    meeting: Rendezvous, rank: int, device: torch.device, listener: socket.socket | None = None
) -> Communicator:
    """This rank's end of a communicator over the wire that `meeting` names; `join` comes next.

    Args:
        rank: senders first, then the workers server by server.
        device: of the buffers; on the shared wire a worker's is one that a sender has too.
        listener: rank 0's.

    Raises:
        TransportError: rank 0's store cannot be reached.
    """
    return Communicator(meeting, rank, device, listener, _WIRES[meeting.wire])
