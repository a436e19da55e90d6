"""This machine's address on one of its networks, and a meeting point of torchrun that listens there alone."""

import contextlib
import socket
import time
from datetime import timedelta
from urllib.parse import urlsplit

import psutil
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from rto_megatron.config.addresses import without_localhost
from rto_megatron.errors import MachineError

MEETING = "rto"  # the name of `meet` as a rendezvous backend
_STORE_TIMEOUT = timedelta(seconds=60)
_JOIN_TIMEOUT = timedelta(seconds=600)  # nodes of one job start their processes minutes apart
_ONE_TRY_S = 2.0
_PAUSE_S = 0.5


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface of this machine.

    Raises:
        MachineError: there is no such interface, or it has no such address.
    """
    addresses = {
        one: str(entry.address)
        for one, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family is socket.AF_INET
    }
    if name not in addresses:
        known = ", ".join(f"{one} ({address})" for one, address in addresses.items())
        raise MachineError(
            f"network interface {name!r} of {socket.gethostname()} has no IPv4 address; found {known}"
        )
    return addresses[name]


def host_of(server: str) -> str:
    """The host of an inference server's address, as in http://HOST:PORT."""
    return urlsplit(server).hostname or server


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, reached over its loopback interface."""
    return without_localhost(host).startswith("127.")


def listening_store(address: str, port: int) -> dist.TCPStore:
    """A store that listens on `address` alone; without a listener of ours TCPStore listens on every interface.

    Args:
        port: 0 picks a free one.

    Raises:
        OSError: the address is not this machine's, or the port is taken.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(1024)
        # The store takes over the descriptor, so Python must not close it.
        return dist.TCPStore(
            address,
            listener.getsockname()[1],
            is_master=True,
            timeout=_STORE_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    finally:
        listener.close()


class _MeetingHandler(DynamicRendezvousHandler):
    """torch's own, but for where the ranks' store listens (torch 2.13: a method that is not public)."""

    def get_backend(self) -> str:
        return MEETING

    def _create_tcp_store_server(self, master_addr: str, master_port: int) -> dist.TCPStore:
        return listening_store(master_addr, master_port)


def meet(params: RendezvousParameters) -> RendezvousHandler:
    """The meeting of all torchruns of a job, as torch's `c10d` backend makes it, on one interface.

    The machine whose `local_addr` is the endpoint's address has the store.

    Raises:
        MachineError: nobody listens at the endpoint within ten minutes, or this machine has no address.
    """
    host, _, port = without_localhost(params.endpoint).rpartition(":")
    if params.local_addr is None:
        raise MachineError("torchrun was started without --local-addr; give it this machine's address")
    store = _meeting_store(host, int(port), is_here=params.local_addr == host)
    handler: RendezvousHandler = _MeetingHandler.from_backend(
        params.run_id,
        store,
        C10dRendezvousBackend(store, params.run_id),
        params.min_nodes,
        params.max_nodes,
        params.local_addr,
        RendezvousTimeout(join=_JOIN_TIMEOUT),
    )
    return handler


def _meeting_store(host: str, port: int, is_here: bool) -> dist.TCPStore:
    if is_here:
        try:
            return listening_store(host, port)
        except OSError:
            pass  # several nodes can be one machine, and then another one has it
    wait_for_listener(host, port, _JOIN_TIMEOUT.total_seconds())
    return dist.TCPStore(host, port, is_master=False, timeout=_JOIN_TIMEOUT, wait_for_workers=False)


def wait_for_listener(host: str, port: int, limit_s: float) -> None:
    """Returns once somebody listens there. Unlike TCPStore's own wait, a signal of this process ends it.

    Raises:
        MachineError: nobody does within the limit; with the last error.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            with contextlib.closing(socket.create_connection((host, port), _ONE_TRY_S)):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise MachineError(
                    f"nobody listens at the meeting point {host}:{port} after {limit_s:.0f} s ({error}); check that "
                    "the machine of that address has started its part, and that this one reaches it"
                ) from error
        time.sleep(_PAUSE_S)
