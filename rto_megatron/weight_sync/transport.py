"""The communicator of one weight push: every sending trainer rank and every worker of every server.

Words go through the key-value store of the rendezvous, tensors over a wire: by broadcast, over NCCL on CUDA
devices and over gloo on CPUs, or through memory that trainer and pool share (shared.py). Both ends use this
file: the groups are made from torch alone, so that trainer ranks never import vLLM. Nothing waits longer
than the time limit, or for a peer known to be lost.
"""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, TCPStore
from torch.distributed.distributed_c10d import Backend, ProcessGroupGloo

from rto_megatron.weight_sync.words import InFlight, SilenceError, TransportError, Words

LOOPBACK = "127.0.0.1"


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
    """Where the ranks of one communicator meet: the senders, then the workers server by server."""

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
    """How tensors travel; used by `Communicator` alone. May raise RuntimeError wherever a peer can be lost."""

    @property
    def place(self) -> str:
        """Stated to the other ranks before `join`."""
        ...

    def join(self, places: list[str]) -> None:
        """Called by all ranks at the same time, with what they stated, by rank."""
        ...

    def send_buffers(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        """See `Communicator.send_buffers`."""
        ...

    def start(self, buffer: Tensor, source: int) -> InFlight:
        """See `Communicator.start_broadcast`."""
        ...


class NetworkWire:
    """Broadcasts among the first `world_size` ranks."""

    place = ""

    def __init__(self, words: Words, meeting: Rendezvous, world_size: int, device: torch.device) -> None:
        self._words = words
        self._meeting = meeting
        self._world_size = world_size
        self._device = device

    def join(self, places: list[str]) -> None:
        """Makes the group."""
        store = PrefixStore("group", self._words.store)
        self._group = _group(self._meeting, store, self._words.rank, self._world_size, self._device)

    def send_buffers(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        """See `Communicator.send_buffers`."""
        first, second = (torch.empty(num_bytes, dtype=torch.uint8, device=self._device) for _ in range(2))
        return first, second

    def start(self, buffer: Tensor, source: int) -> InFlight:
        """See `Communicator.start_broadcast`."""
        options = BroadcastOptions()
        options.rootRank = source
        options.rootTensor = 0
        in_flight: InFlight = self._group.broadcast([buffer], options)
        return in_flight


MakeWire = Callable[[Words, Rendezvous, torch.device], Wire]


def network(words: Words, meeting: Rendezvous, device: torch.device) -> Wire:
    """The wire between all ranks."""
    return NetworkWire(words, meeting, meeting.world_size, device)


class Communicator:
    """One rank's end of a communicator; `join` before anything else.

    Rank 0 passes its listener. `communicators.open_communicator` picks the wire that the meeting names.

    Raises:
        TransportError: rank 0's store cannot be reached.
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
            self._words = Words(_store(meeting, listener), rank, meeting.timeout_s)
        except RuntimeError as error:
            raise TransportError(f"{self} could not reach the meeting point: {error}") from None
        self._wire = make_wire(self._words, meeting, device)

    def __str__(self) -> str:
        return f"weight transfer: rank {self.rank} of {self.world_size}"

    def join(self) -> None:
        """Makes the wire. Called by all ranks at the same time.

        Raises:
            TransportError: the ranks did not meet within the time limit, or cannot share memory as they should.
        """
        # All meet in the store first: a rank that waits in a half-built group blocks its peers.
        places = self.exchange(self._wire.place)
        try:
            self._wire.join(places)
        except TransportError:
            raise
        except RuntimeError as error:
            raise TransportError(f"{self} could not join: {error}") from None

    def abort(self, reason: str) -> None:
        """Makes every rank that waits, or ever will, give up; from any thread."""
        try:
            self._words.abort(reason)
        except RuntimeError:
            return  # the store died with rank 0, which every rank notices by itself

    def send_buffers(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        """Two uint8 buffers, the only ones that a sender may broadcast from and receive into; ask once.

        Raises:
            TransportError: the store is lost.
        """
        try:
            return self._wire.send_buffers(num_bytes)
        except RuntimeError as error:
            raise TransportError(f"{self} has no buffers: {error}") from None

    def start_broadcast(self, buffer: Tensor, source: int) -> "Broadcast":
        """Begins to send `buffer` from rank `source` into the others' buffers.

        Called by all ranks with equal sizes and in the same order; `buffer` must stay untouched until `finish`.

        Raises:
            TransportError: a peer is gone.
        """
        deadline = self._words.deadline()
        try:
            return Broadcast(self._wire.start(buffer, source), source, deadline)
        except TransportError:
            raise
        except RuntimeError as error:
            raise TransportError(f"weight transfer: broadcast from rank {source} failed: {error}") from None

    def finish(self, broadcast: "Broadcast") -> None:
        """Waits for a broadcast.

        Raises:
            TransportError: not done within the time limit, or a peer is gone.
        """
        try:
            self._words.wait_for(broadcast.in_flight, broadcast.source, broadcast.deadline)
        except TransportError:
            raise
        except RuntimeError as error:
            raise TransportError(
                f"weight transfer: broadcast from rank {broadcast.source} failed: {error}"
            ) from None

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
        deadline = self._words.deadline()
        try:
            self._words.say(f"{self._num_statements}/{self.rank}", statement)
            for rank in range(self.world_size):
                heard.append(self._words.hear(f"{self._num_statements}/{rank}", deadline))
        except SilenceError as error:
            raise TransportError(f"weight transfer: nothing heard from rank {len(heard)}: {error}") from None
        except TransportError:
            raise
        except RuntimeError as error:
            raise TransportError(f"weight transfer: nothing heard from rank {len(heard)}: {error}") from None
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
    """One that was begun; `deadline` is in monotonic seconds."""

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


def _group(
    meeting: Rendezvous, store: PrefixStore, rank: int, world_size: int, device: torch.device
) -> Backend:
    limit = timedelta(seconds=meeting.timeout_s)
    if device.type == "cuda":
        from torch.distributed.distributed_c10d import (
            ProcessGroupNCCL,
        )  # torch builds without CUDA have no such name

        nccl = ProcessGroupNCCL.Options()
        nccl._timeout = limit
        with torch.cuda.device(device):
            return ProcessGroupNCCL(store, rank, world_size, nccl)
    gloo = ProcessGroupGloo._Options()
    gloo._timeout = limit
    if meeting.host == LOOPBACK:
        gloo._devices = [ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    elif "GLOO_SOCKET_IFNAME" in os.environ:
        gloo._devices = [ProcessGroupGloo.create_device(interface=os.environ["GLOO_SOCKET_IFNAME"])]
    else:
        gloo._devices = [ProcessGroupGloo.create_default_device()]
    return ProcessGroupGloo(store, rank, world_size, gloo)
