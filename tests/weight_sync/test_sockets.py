"""Sockets of this process, ended where another process holds the other end."""

import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from rto_megatron.weight_sync.sockets import listening, shut_down

FAMILIES = pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
CALLER = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), 60)
sys.exit(connection.recv(1) != b"")
"""
LISTENER = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0), family=int(sys.argv[2]))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
connection.settimeout(60)
sys.exit(connection.recv(1) != b"")
"""


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@FAMILIES
def test_connections_to_our_listener_end_and_it_still_listens(
    family: socket.AddressFamily, host: str
) -> None:
    before = listening()
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((host, 0), family=family))
        address = listener.getsockname()[:2]
        assert listening() - before == {address}
        caller = stack.enter_context(python(CALLER, *address))
        connection = stack.enter_context(listener.accept()[0])
        connection.settimeout(10)
        shut_down({address})
        assert connection.recv(1) == b""
        assert caller.wait(60) == 0
        stack.enter_context(socket.create_connection(address, 10))


@FAMILIES
def test_connections_to_another_process_end(family: socket.AddressFamily, host: str) -> None:
    with python(LISTENER, host, int(family)) as listener:
        assert listener.stdout is not None
        address = (host, int(listener.stdout.readline()))
        with socket.create_connection(address, 10) as connection:
            shut_down({address})
            assert connection.recv(1) == b""
            assert listener.wait(60) == 0


def test_other_connections_go_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as other:
        caller = socket.create_connection(other.getsockname(), 10)
        called = other.accept()[0]
        with caller, called:
            shut_down({listener.getsockname()})
            caller.sendall(b"a")
            assert called.recv(1) == b"a"
