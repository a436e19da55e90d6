"""Picks the wire of a communicator."""

import socket

import torch

from rto_megatron.weight_sync.shared import shared
from rto_megatron.weight_sync.transport import Communicator, Rendezvous, network

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
