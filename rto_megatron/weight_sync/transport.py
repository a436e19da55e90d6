"""The communicator of one weight push: every sending trainer rank and every worker of every server.

Control messages go through the key-value store of the rendezvous, tensors over a wire: by broadcast, over NCCL on CUDA
devices and over gloo on CPUs, or through memory that trainer and pool share (shared.py). Both ends use this
file: the groups are made from torch alone, so that trainer ranks never import vLLM. Nothing waits longer
than the time limit, or for a peer known to be lost.
"""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.distributed import (
    BroadcastOptions,
    PrefixStore,
    ProcessGroupGloo,  # distributed_c10d may hold the one that shares devices (P11)
    TCPStore,
)

from rto_megatron.weight_sync.control_channel import ControlChannel, InFlight, TransportError
from rto_megatron.weight_sync.nccl_group import FirstBroadcast, nccl_group
from rto_megatron.weight_sync.sockets import Address, listening, shut_down

LOOPBACK = "127.0.0.1"
_DEVICE_TRIES = 10
_making_device = threading.Lock()


class DisagreementError(RuntimeError):
    """Ranks reported errors or hold other data than the rest; all ranks know and are in step.

    Args:
        ranks: those with an error, or that differ from rank 0.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one communicator meet: the senders, then the workers server by server.

    Example:
        Rendezvous("127.0.0.1", 29501, num_senders=2, world_size=3, name="a", timeout_s=300, device_type="cpu")
    """

    host: str
    port: int
    num_senders: int
    world_size: int
    name: str
    timeout_s: float
    device_type: str  # "cuda" or "cpu"
    wire: Literal["network", "shared"] = "network"

    def to_json(self) -> str:
        """Text for the broadcast to the other senders."""
        return json.dumps(vars(self))

    @staticmethod
    def from_json(text: str) -> "Rendezvous":
        """Reads `to_json`."""
        return Rendezvous(**json.loads(text))


def listen(host: str) -> socket.socket:
    """A listening socket on one address; TCPStore on its own would listen on all of them."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(1024)
    return listener


class Wire(Protocol):
    """How tensors travel; used by `Communicator` alone. May raise RuntimeError wherever a peer can be lost.

    Example:
        wire.join(memories)
        wire.start(buffer, source=0)
    """

    @property
    def memory(self) -> str:
        """Stated to the other ranks before `join`."""
        ...

    def join(self, memories: list[str]) -> None:
        """Called by all ranks at the same time, with what they stated, by rank."""
        ...

    def send_buffers(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        """See `Communicator.send_buffers`."""
        ...

    def start(self, buffer: Tensor, source: int) -> InFlight:
        """See `Communicator.start_broadcast`."""
        ...

    def give_up(self) -> None:
        """Ends what is under way, here and for the ranks at its other end; nothing can be started afterwards."""
        ...


class _Group(Protocol):
    """What is used of torch's groups, whose stubs leave it out."""

    def broadcast(self, tensors: list[Tensor], options: BroadcastOptions) -> InFlight: ...

    def abort(self) -> None: ...


class NetworkWire:
    """Broadcasts among the first `world_size` ranks.

    Example:
        NetworkWire(channel, meeting, world_size=3, device=device).join(memories)
    """

    memory = ""

    def __init__(
        self, channel: ControlChannel, meeting: Rendezvous, world_size: int, device: torch.device
    ) -> None:
        self._channel = channel
        self._meeting = meeting
        self._world_size = world_size
        self._device = device
        self._group: _Group | None = None
        self._listeners: list[Address] = []  # gloo's, of all ranks

    def join(self, memories: list[str]) -> None:
        """Makes the group."""
        store = PrefixStore("group", self._channel.store)
        if self._device.type == "cuda":
            rank, timeout_s = self._channel.rank, self._meeting.timeout_s
            group = nccl_group(store, rank, self._world_size, timeout_s, self._device)
            self._group = group  # type: ignore[assignment]  # see _Group
            first = FirstBroadcast(group, self._device)
            self._channel.wait_for(first, source=0, deadline=self._channel.deadline())
            return
        device, address = _gloo_device(self._meeting.host)
        self._channel.say(f"listener/{self._channel.rank}", json.dumps(address))
        said = [self._channel.hear(f"listener/{rank}") for rank in range(self._world_size)]
        self._listeners = [(host, port) for host, port in map(json.loads, said)]
        self._group = _gloo(self._meeting, store, self._channel.rank, self._world_size, device)

    def send_buffers(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        """See `Communicator.send_buffers`."""
        first, second = (torch.empty(num_bytes, dtype=torch.uint8, device=self._device) for _ in range(2))
        return first, second

    def start(self, buffer: Tensor, source: int) -> InFlight:
        """See `Communicator.start_broadcast`."""
        options = BroadcastOptions()
        options.rootRank = source
        options.rootTensor = 0
        if self._group is None:
            raise TransportError("weight transfer: this rank has given up")
        return self._group.broadcast([buffer], options)

    def give_up(self) -> None:
        """Ends the broadcasts in flight; those of NCCL would keep the device from whatever comes behind them."""
        group, self._group = self._group, None
        if self._listeners:
            shut_down(self._listeners)
            # Torch cannot abort a broadcast of gloo, which does not notice a connection that ends within a message, and
            # the group's destructor waits for all in flight: until the time limit, so not on this thread.
            left = [group]
            del group
            threading.Thread(target=left.clear, daemon=True).start()
        elif group is not None:
            with suppress(RuntimeError):  # it is lost already, or does not end within the time limit
                group.abort()


MakeWire = Callable[[ControlChannel, Rendezvous, torch.device], Wire]


def network(channel: ControlChannel, meeting: Rendezvous, device: torch.device) -> Wire:
    """The wire between all ranks."""
    return NetworkWire(channel, meeting, meeting.world_size, device)


class Communicator:
    """One rank's end of a communicator; `join` before anything else.

    Rank 0 passes its listener. `communicators.open_communicator` picks the wire that the meeting names.

    Raises:
        TransportError: rank 0's store cannot be reached.

    Example:
        Communicator(meeting, rank=0, device=device).join()
    """

    def __init__(
        self,
        meeting: Rendezvous,
        rank: int,
        device: torch.device,
        listener: socket.socket | None = None,
        make_wire: MakeWire = network,
    ) -> None:
        self.rank = rank
        self.num_senders = meeting.num_senders
        self.world_size = meeting.world_size
        self.device = device
        self._num_statements = 0
        try:
            self._channel = ControlChannel(_store(meeting, listener), rank, meeting.timeout_s)
        except RuntimeError as error:
            raise TransportError(f"{self} could not reach the meeting point: {error}") from None
        self._wire = make_wire(self._channel, meeting, device)

    def __str__(self) -> str:
        return f"weight transfer: rank {self.rank} of {self.world_size}"

    def join(self) -> None:
        """Makes the wire. Called by all ranks at the same time.

        Raises:
            TransportError: the ranks did not meet within the time limit, or cannot share memory as they should.
        """
        # All meet in the store first: a rank that waits in a half-built group blocks its peers.
        memories = self.exchange(self._wire.memory)
        with self._lost_if(f"{self} could not join"):
            self._wire.join(memories)

    @contextmanager
    def _lost_if(self, failure: str) -> Iterator[None]:
        """Has all ranks give up where the body fails: others may wait for this one."""
        try:
            yield
        except RuntimeError as error:
            own = str(error) if isinstance(error, TransportError) else f"{failure}: {error}"
            first = self.give_up(own)
            raise TransportError(own if own == first else f"weight transfer given up: {first}") from None

    def give_up(self, reason: str) -> str:
        """Ends what is under way on this rank, and makes every other one give up.

        Returns:
            The reason of the first rank that gave up.
        """
        first = self.abort(reason)  # before the others lose a connection, so that they hear it
        self._wire.give_up()
        return first

    def abort(self, reason: str) -> str:
        """Makes every rank that waits, or ever will, give up; from any thread. Returns the first reason."""
        try:
            return self._channel.abort(reason)
        except RuntimeError:
            return reason  # the store died with rank 0, which every rank notices by itself

    def send_buffers(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        """Two uint8 buffers, the only ones that a sender may broadcast from and receive into; ask once.

        Raises:
            TransportError: the store is lost.
        """
        with self._lost_if(f"{self} has no buffers"):
            return self._wire.send_buffers(num_bytes)

    def start_broadcast(self, buffer: Tensor, source: int) -> "Broadcast":
        """Begins to send `buffer` from rank `source` into the others' buffers.

        Called by all ranks with equal sizes and in the same order; `buffer` must stay untouched until `finish`.

        Raises:
            TransportError: a peer is gone.
        """
        deadline = self._channel.deadline()
        with self._lost_if(f"weight transfer: broadcast from rank {source} failed"):
            return Broadcast(self._wire.start(buffer, source), source, deadline)

    def finish(self, broadcast: "Broadcast") -> None:
        """Waits for a broadcast.

        Raises:
            TransportError: not done within the time limit, or a peer is gone.
        """
        with self._lost_if(f"weight transfer: broadcast from rank {broadcast.source} failed"):
            self._channel.wait_for(broadcast.in_flight, broadcast.source, broadcast.deadline)

    def broadcast(self, buffer: Tensor, source: int) -> None:
        """`start_broadcast` and `finish`."""
        self.finish(self.start_broadcast(buffer, source))

    def exchange(self, statement: str) -> list[str]:
        """Returns what every rank stated, by rank. Called by all ranks.

        Raises:
            TransportError: a rank said nothing within the time limit.
        """
        self._num_statements += 1
        heard: list[str] = []
        deadline = self._channel.deadline()
        with self._lost_if(f"{self} cannot be heard"):
            self._channel.say(f"{self._num_statements}/{self.rank}", statement)
        for rank in range(self.world_size):
            with self._lost_if(f"weight transfer: nothing heard from rank {rank}"):
                heard.append(self._channel.hear(f"{self._num_statements}/{rank}", deadline))
        return heard

    def agree(self, error: str | None, token: str = "", explain: Callable[[], str] | None = None) -> None:
        """Goes on only if no rank has an error and all hold the same token. Called by all ranks.

        Args:
            error: what is wrong on this rank, None for nothing.
            token: must be equal on all ranks.
            explain: called on all ranks when tokens differ; says how. May use the communicator.

        Raises:
            DisagreementError: on all ranks alike, with every rank's error.
            TransportError: a rank said nothing within the time limit.
        """
        heard = [json.loads(text) for text in self.exchange(json.dumps([error, token]))]
        errors = {rank: said for rank, (said, _) in enumerate(heard) if said is not None}
        if errors:
            words = "; ".join(f"rank {rank}: {said}" for rank, said in errors.items())
            raise DisagreementError(words, tuple(errors))
        parted = tuple(rank for rank, (_, shown) in enumerate(heard) if shown != heard[0][1])
        if parted:
            raise DisagreementError(explain() if explain is not None else f"ranks differ: {heard}", parted)


@dataclass(frozen=True)
class Broadcast:
    """One that was begun; `deadline` is in monotonic seconds.

    Example:
        communicator.finish(Broadcast(in_flight, source=0, deadline=deadline))
    """

    in_flight: InFlight
    source: int
    deadline: float


def _store(meeting: Rendezvous, listener: socket.socket | None) -> PrefixStore:
    limit = timedelta(seconds=meeting.timeout_s)
    # Direct construction: torch's rendezvous() obeys TORCHELASTIC_USE_AGENT_STORE inside torchrun and would
    # join the launcher's store in place of this one.
    if listener is None:
        store = TCPStore(meeting.host, meeting.port, None, False, limit, wait_for_workers=False)
    else:
        store = TCPStore(
            meeting.host,
            meeting.port,
            None,
            True,
            limit,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    return PrefixStore(meeting.name, store)


def _gloo(
    meeting: Rendezvous, store: PrefixStore, rank: int, world_size: int, device: ProcessGroupGloo.Device
) -> _Group:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # a name that the stub spells otherwise
    options._timeout = timedelta(seconds=meeting.timeout_s)
    options._devices = [device]
    return ProcessGroupGloo(store, rank, world_size, options)  # type: ignore[return-value]  # see _Group


def _gloo_device(host: str) -> tuple[ProcessGroupGloo.Device, Address]:
    """A device of gloo's and the address that it listens on, which gloo does not tell."""
    with _making_device:
        for _ in range(_DEVICE_TRIES):
            before = listening()
            if host == LOOPBACK:
                device = ProcessGroupGloo.create_device(hostname=LOOPBACK)
            elif "GLOO_SOCKET_IFNAME" in os.environ:
                device = ProcessGroupGloo.create_device(interface=os.environ["GLOO_SOCKET_IFNAME"])
            else:
                device = ProcessGroupGloo.create_default_device()
            found = listening() - before
            if len(found) == 1:  # else another thread began to listen meanwhile
                return device, found.pop()
    raise RuntimeError(f"expected gloo to listen on one address, found {sorted(found)}")
