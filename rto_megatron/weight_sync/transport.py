"""One communicator that holds every sending trainer rank and every worker of every inference server.

Data goes through a broadcast, over NCCL on CUDA devices and over gloo on CPUs; words go through the
key-value store of the rendezvous. Both ends use this file: the groups are made from torch alone, so that
trainer ranks never import vLLM.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, TCPStore
from torch.distributed.distributed_c10d import Backend, ProcessGroupGloo

LOOPBACK = "127.0.0.1"
_POLL_S = 2e-4


class TransportError(RuntimeError):
    """The communicator is lost: a peer is gone or too slow. A new one is needed."""


class DisagreementError(RuntimeError):
    """A rank reported an error or another manifest; all ranks know, all are in step, nothing was loaded."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one communicator meet: the senders, then the workers server by server."""

    host: str
    port: int
    world_size: int
    name: str
    timeout_s: float
    device_type: str  # "cuda" or "cpu"

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


class Communicator:
    """One rank's end of a communicator.

    Constructed by all ranks at the same time; rank 0 passes its listener.

    Raises:
        TransportError: the ranks did not meet within the time limit.
    """

    def __init__(
        self, meeting: Rendezvous, rank: int, device: torch.device, listener: socket.socket | None = None
    ) -> None:
        self.rank = rank
        self.world_size = meeting.world_size
        self.device = device
        self._timeout_s = meeting.timeout_s
        self._num_statements = 0
        try:
            self._store = _store(meeting, listener)
            # All meet in the store first: a rank that waits in a half-built group blocks its peers.
            self.exchange("")
            self._group = _group(meeting, PrefixStore("group", self._store), rank, device)
        except RuntimeError as error:
            raise TransportError(
                f"weight transfer: rank {rank} of {self.world_size} could not join: {error}"
            ) from None

    def broadcast(self, buffer: Tensor, source: int) -> None:
        """Sends `buffer` from rank `source` into the others' buffers. Called by all ranks with equal sizes.

        Raises:
            TransportError: not done within the time limit, or a peer is gone.
        """
        options = BroadcastOptions()
        options.rootRank = source
        options.rootTensor = 0
        deadline = time.monotonic() + self._timeout_s
        try:
            work = self._group.broadcast([buffer], options)
            # NCCL's own wait has no time limit unless its watchdog may kill the whole process.
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise TransportError(
                        f"weight transfer: no broadcast from rank {source} in {self._timeout_s:.0f} s"
                    )
                time.sleep(_POLL_S)
            work.wait()
        except TransportError:
            raise
        except RuntimeError as error:
            raise TransportError(f"weight transfer: broadcast from rank {source} failed: {error}") from None

    def exchange(self, statement: str) -> list[str]:
        """Returns what every rank stated, by rank. Called by all ranks.

        Raises:
            TransportError: a rank said nothing within the time limit.
        """
        self._num_statements += 1
        heard = []
        try:
            self._store.set(f"{self._num_statements}/{self.rank}", statement)
            for rank in range(self.world_size):
                heard.append(self._store.get(f"{self._num_statements}/{rank}").decode())
        except RuntimeError as error:  # torch's DistStoreError is one
            silent = len(heard)
            raise TransportError(f"weight transfer: nothing heard from rank {silent}: {error}") from None
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
        errors = [f"rank {rank}: {said}" for rank, (said, _) in enumerate(heard) if said is not None]
        if errors:
            raise DisagreementError("; ".join(errors))
        if len({shown for _, shown in heard}) > 1:
            raise DisagreementError(explain() if explain is not None else f"ranks differ: {heard}")


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


def _group(meeting: Rendezvous, store: PrefixStore, rank: int, device: torch.device) -> Backend:
    limit = timedelta(seconds=meeting.timeout_s)
    if device.type == "cuda":
        from torch.distributed.distributed_c10d import (
            ProcessGroupNCCL,
        )  # torch builds without CUDA have no such name

        nccl = ProcessGroupNCCL.Options()
        nccl._timeout = limit
        with torch.cuda.device(device):
            return ProcessGroupNCCL(store, rank, meeting.world_size, nccl)
    gloo = ProcessGroupGloo._Options()
    gloo._timeout = limit
    if meeting.host == LOOPBACK:
        gloo._devices = [ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    elif "GLOO_SOCKET_IFNAME" in os.environ:
        gloo._devices = [ProcessGroupGloo.create_device(interface=os.environ["GLOO_SOCKET_IFNAME"])]
    else:
        gloo._devices = [ProcessGroupGloo.create_default_device()]
    return ProcessGroupGloo(store, rank, meeting.world_size, gloo)
