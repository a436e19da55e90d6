"""The port of a server that is still starting is given to nobody else, and the server can listen on it."""

import contextlib
import errno
import socket
import struct
from collections.abc import Callable

import pytest

from rto_megatron.generation.vllm.start.server import _claim_port

IP_LOCAL_PORT_RANGE = 51  # linux/in.h, since Linux 6.3: the ports that the kernel may choose for one socket


def chosen(port: int, choose: Callable[[socket.socket], None]) -> int | None:
    """The port that the kernel chooses for a socket of one that may have `port` alone; None: it may not."""
    with contextlib.closing(socket.socket()) as one:
        try:
            one.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
        except OSError as error:
            assert error.errno == errno.ENOPROTOOPT
            pytest.skip("this kernel is too old to be asked for one port")
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            choose(one)
        except OSError as error:
            assert error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
            return None
        return int(one.getsockname()[1])


def test_a_claimed_port_is_given_to_nobody_and_can_be_listened_on() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
        kinds: list[Callable[[socket.socket], None]] = [
            lambda one: one.bind(("127.0.0.1", 0)),
            lambda one: one.connect(other.getsockname()),
        ]
        claim = _claim_port("127.0.0.1", None)
        port = claim.getsockname()[1]
        assert [chosen(port, choose) for choose in kinds] == [None, None]
        socket.create_server(("127.0.0.1", port)).close()  # with SO_REUSEADDR, as vLLM's
        claim.close()
        assert [chosen(port, choose) for choose in kinds] == [port, port]
