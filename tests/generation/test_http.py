"""What `GenerationHttp` makes of servers that refuse, fail, stay silent, or close a connection it kept."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from rto_megatron.errors import UserError
from rto_megatron.generation.contract import Unreachable
from rto_megatron.generation.vllm.client.http import GenerationHttp
from rto_megatron.generation.vllm.client.server_client import (
    Json,
    RefusedError,
    ServerClient,
    ServerFailedError,
)

ROUTE = "/inference/v1/generate"
BODY: dict[str, Json] = {"token_ids": [1, 5], "sampling_params": {"seed": 3}}


class RawServer:
    """Accepts connections and hands each to `serve` in a thread of its own; counts connections and requests."""

    def __init__(self, serve: Callable[["RawServer", socket.socket], None]) -> None:
        self.num_connections = 0
        self.requests: list[bytes] = []
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def read(self, connection: socket.socket) -> bool:
        """Reads one whole request; False when the client closed instead."""
        received = b""
        while True:
            head, found, content = received.partition(b"\r\n\r\n")
            if found and len(content) >= _content_length(head):
                self.requests.append(received)
                return True
            piece = connection.recv(65536)
            if not piece:
                return False
            received += piece

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        with connection:
            self._serve(self, connection)


def _content_length(head: bytes) -> int:
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return int(lengths[0].split(b":")[1]) if lengths else 0


def answer(content: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(content)}\r\n{more}\r\n".encode() + content


@contextmanager
def serving(serve: Callable[[RawServer, socket.socket], None]) -> Iterator[RawServer]:
    server = RawServer(serve)
    try:
        yield server
    finally:
        server.close()


def always(
    content: bytes, status: str = "200 OK", more: str = ""
) -> Callable[[RawServer, socket.socket], None]:
    def serve(server: RawServer, connection: socket.socket) -> None:
        while server.read(connection):
            connection.sendall(answer(content, status, more))

    return serve


def post(address: str, timeout_s: float = 5, times: int = 1) -> list[dict[str, Json]]:
    """Answers of requests sent one after the other, with the token t."""

    async def run() -> list[dict[str, Json]]:
        async with GenerationHttp("t", timeout_s) as http:
            return [await http.post(address, ROUTE, BODY) for _ in range(times)]

    return asyncio.run(run())


def test_a_request_carries_the_token_and_the_json_body() -> None:
    with serving(always(b'{"choices": []}')) as server:
        assert post(server.address) == [{"choices": []}]
    (request,) = server.requests
    assert request.startswith(f"POST {ROUTE} HTTP/1.1\r\n".encode())
    assert b"\r\nAuthorization: Bearer t\r\n" in request
    assert request.endswith(b'\r\n\r\n{"token_ids": [1, 5], "sampling_params": {"seed": 3}}')


def test_an_empty_answer_is_an_empty_object() -> None:
    with serving(always(b"")) as server:
        assert post(server.address) == [{}]


def test_a_refused_connection_names_the_address_and_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(
        Unreachable, match=rf"cannot reach inference server {address} \(ConnectionRefusedError.*rto pool"
    ):
        post(address)


def test_an_address_that_is_none_is_named() -> None:
    with pytest.raises(Unreachable, match=r"cannot reach inference server localhost:8000 .*rollout\.servers"):
        post("localhost:8000")


def test_silence_ends_at_the_time_limit() -> None:
    def never(server: RawServer, connection: socket.socket) -> None:
        server.read(connection)
        connection.recv(1)

    with serving(never) as server:
        with pytest.raises(Unreachable, match="did not answer in time"):
            post(server.address, timeout_s=0.1)
        assert len(server.requests) == 1


def test_a_limit_of_the_request_overrides_the_clients() -> None:
    def never(server: RawServer, connection: socket.socket) -> None:
        server.read(connection)
        connection.recv(1)

    async def run(address: str) -> None:
        async with GenerationHttp("t", 60) as http:
            await http.post(address, ROUTE, BODY, timeout_s=0.1)

    with serving(never) as server, pytest.raises(Unreachable, match="did not answer in time"):
        asyncio.run(run(server.address))


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        ("401 Unauthorized", RefusedError, r"refused the token; rollout\.token_file"),
        ("400 Bad Request", RefusedError, f"answered 400 to {ROUTE}: too long"),
        ("500 Internal Server Error", ServerFailedError, f"answered 500 to {ROUTE}: too long"),
        ("502 Bad Gateway", ServerFailedError, "answered 502"),
        ("503 Service Unavailable", Unreachable, f"answered 503 to {ROUTE}: too long"),
    ],
)
def test_an_error_of_the_server_keeps_its_words(status: str, kind: type[UserError], words: str) -> None:
    with serving(always(b"too long", status)) as server:
        with pytest.raises(kind, match=words) as caught:
            post(server.address)
        assert type(caught.value) is kind
        assert len(server.requests) == 1


def test_an_answer_that_is_no_json_is_an_error() -> None:
    with (
        serving(always(b"<html>")) as server,
        pytest.raises(RefusedError, match="something that is not JSON"),
    ):
        post(server.address)


def test_an_answer_that_is_no_http_is_an_error() -> None:
    def serve(server: RawServer, connection: socket.socket) -> None:
        server.read(connection)
        connection.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")

    with serving(serve) as server, pytest.raises(Unreachable, match="cannot reach inference server"):
        post(server.address)


def test_an_answer_cut_short_is_an_error_and_not_asked_again() -> None:
    def serve(server: RawServer, connection: socket.socket) -> None:
        server.read(connection)
        connection.sendall(answer(b'{"choices": []}')[:-5])

    with serving(serve) as server:
        with pytest.raises(Unreachable, match="cannot reach inference server"):
            post(server.address)
        assert len(server.requests) == 1


def test_a_redirect_is_not_followed_with_the_token() -> None:
    with serving(always(b"{}")) as other:
        location = f"location: {other.address}{ROUTE}\r\n"
        redirecting = always(b"", "307 Temporary Redirect", location)
        with serving(redirecting) as server, pytest.raises(RefusedError, match="answered 307"):
            post(server.address)
        assert other.requests == []


def test_a_proxy_of_the_environment_does_not_receive_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(always(b"{}")) as proxy, serving(always(b'{"is_paused": true}')) as server:
        monkeypatch.setenv("http_proxy", proxy.address)
        monkeypatch.delenv("no_proxy", raising=False)
        assert post(server.address) == [{"is_paused": True}]
        with ServerClient(server.address, "t", 5) as client:
            assert client.is_paused()
        assert proxy.requests == []


def test_requests_one_after_the_other_share_a_connection() -> None:
    with serving(always(b"{}")) as server:
        assert post(server.address, times=3) == [{}, {}, {}]
        assert (server.num_connections, len(server.requests)) == (1, 3)


@pytest.mark.parametrize("reads", [True, False], ids=["after_reading", "before_reading"])
def test_a_kept_connection_that_drops_costs_one_try_on_another(reads: bool) -> None:
    """The server answers once per connection, and closes when the second request comes."""

    def serve(server: RawServer, connection: socket.socket) -> None:
        server.read(connection)
        connection.sendall(answer(b'{"number": %d}' % len(server.requests)))
        if reads:
            server.read(connection)
        else:
            connection.recv(1, socket.MSG_PEEK)  # unread bytes make the close a reset

    with serving(serve) as server:
        answers = post(server.address, times=2)
        assert answers == [{"number": 1}, {"number": 3 if reads else 2}]
        assert (server.num_connections, len(server.requests)) == (2, 3 if reads else 2)
        assert len({request.partition(b"\r\n\r\n")[2] for request in server.requests}) == 1


def test_a_dropped_connection_is_tried_again_only_once() -> None:
    def serve(server: RawServer, connection: socket.socket) -> None:
        server.read(connection)
        if server.num_connections == 1:
            connection.sendall(answer(b"{}"))
            server.read(connection)

    with serving(serve) as server:
        with pytest.raises(Unreachable, match="ServerDisconnectedError"):
            post(server.address, times=2)
        assert (server.num_connections, len(server.requests)) == (2, 3)


def test_a_fresh_connection_that_drops_is_not_tried_again() -> None:
    """The request may be with the engine: whoever asks decides whether another server is asked."""

    def serve(server: RawServer, connection: socket.socket) -> None:
        server.read(connection)

    with serving(serve) as server:
        with pytest.raises(Unreachable, match="ServerDisconnectedError"):
            post(server.address)
        assert len(server.requests) == 1


def test_both_tries_share_the_time_limit() -> None:
    def serve(server: RawServer, connection: socket.socket) -> None:
        server.read(connection)
        if server.num_connections == 1:
            connection.sendall(answer(b"{}"))
            server.read(connection)
        else:
            connection.recv(1)

    with serving(serve) as server, pytest.raises(Unreachable, match="did not answer in time"):
        post(server.address, timeout_s=0.3, times=2)


def test_a_cancelled_request_closes_its_connection() -> None:
    """Whoever gives a request up must free the server of it."""
    closed = threading.Event()

    def serve(server: RawServer, connection: socket.socket) -> None:
        server.read(connection)
        if connection.recv(1) == b"":
            closed.set()

    async def run(address: str) -> None:
        async with GenerationHttp("t", 60) as http:
            request = asyncio.create_task(http.post(address, ROUTE, BODY))
            await asyncio.sleep(0.1)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            assert await asyncio.to_thread(closed.wait, 2)

    with serving(serve) as server:
        asyncio.run(run(server.address))
