"""This process's TCP sockets, found where a library holds them and has no way to close them."""

import os
import socket
from collections.abc import Collection, Iterator
from contextlib import suppress

type Address = tuple[str, int]  # host and port


def listening() -> set[Address]:
    """Addresses that this process listens on."""
    return {
        _address(opened.getsockname())
        for opened in _sockets()
        if opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    }


def shut_down(listeners: Collection[Address]) -> None:
    """Ends this process's connections to and from these listeners; whoever waits on one, at either end, hears of it."""
    for opened in _sockets():
        with suppress(OSError):  # it is not connected, as the listeners are not
            ends = _address(opened.getpeername()), _address(opened.getsockname())
            if any(end in listeners for end in ends):
                opened.shutdown(socket.SHUT_RDWR)


def _address(name: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    return name[0], name[1]  # IPv6 adds two numbers


def _sockets() -> Iterator[socket.socket]:
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = os.dup(int(name))
        except OSError:
            continue  # closed meanwhile
        try:
            opened = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)  # no socket
            continue
        with opened:
            if opened.family in (socket.AF_INET, socket.AF_INET6) and opened.type == socket.SOCK_STREAM:
                yield opened
