"""Phases of a colocated server: against a canned one that keeps vLLM's rules of sleep, and against the real one."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pool_server import PoolServer

from rto_megatron.errors import PoolError
from rto_megatron.generation.contract import Unreachable
from rto_megatron.generation.vllm.client.phases import Phase, PoolPhases
from rto_megatron.generation.vllm.client.server_client import GENERATE_ROUTE, ONE_TOKEN, Json, ServerClient


class SleepyServer:
    """The rules of vLLM 0.32's executor and scheduler (v1/executor/abstract.py, v1/engine/core.py) on one thread."""

    def __init__(self) -> None:
        self.asleep: set[str] = set()
        self.paused = False
        self.version = "default"
        self.routes: list[str] = []
        self.is_deaf = False  # answers 200 and does nothing
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str) -> dict[str, Json]:
        self.routes.append(f"{method} {path}")
        match f"{method} {path}":
            case "GET /weight_info":
                return {"weight_version": self.version}
            case "GET /is_paused":
                return {"is_paused": self.paused}
            case "GET /is_sleeping":
                return {"is_sleeping": self.paused or bool(self.asleep)}
            case "POST /sleep?level=2&mode=abort":
                if not self.is_deaf:
                    self.paused, self.asleep = True, {"weights", "kv_cache"}
                return {"status": "sleeping", "level": 2}
        tag = path.removeprefix("/wake_up?tags=")
        assert method == "POST" and tag in ("weights", "kv_cache"), path
        if not self.is_deaf:
            self.asleep.discard(tag)
            self.paused = self.paused and bool(self.asleep)
        return {"status": "sleeping" if self.asleep else "awake", "tags": [tag]}


def _handler(server: SleepyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def _answer(self, method: str) -> None:
            body = json.dumps(server.answer(method, self.path)).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            return

    return Handler


@pytest.fixture
def server() -> Iterator[SleepyServer]:
    started = SleepyServer()
    yield started
    started.close()


@pytest.fixture
def client(server: SleepyServer) -> Iterator[ServerClient]:
    with ServerClient(server.address, "t", 5) as opened:
        yield opened


def test_a_push_and_its_rollouts_take_the_routes_in_their_order(
    server: SleepyServer, client: ServerClient
) -> None:
    phases = PoolPhases()
    assert phases.of(server.address) is Phase.UNSURE
    phases.begin_push(client)
    assert phases.of(server.address) is Phase.RECEIVING
    assert server.asleep == {"kv_cache"} and server.paused
    server.version = "3"
    phases.end_push(client, 3)
    assert phases.of(server.address) is Phase.SERVING
    assert not server.asleep and not server.paused
    phases.make_room(client)
    assert phases.of(server.address) is Phase.ASLEEP
    assert server.asleep == {"weights", "kv_cache"} and server.paused
    assert [route for route in server.routes if route.startswith("POST")] == [
        "POST /sleep?level=2&mode=abort",
        "POST /wake_up?tags=weights",
        "POST /wake_up?tags=kv_cache",
        "POST /sleep?level=2&mode=abort",
    ]
    assert not any("resume" in route for route in server.routes)


def test_without_the_version_of_a_proved_push_the_cache_stays_asleep_and_the_server_paused(
    server: SleepyServer, client: ServerClient
) -> None:
    phases = PoolPhases()
    server.version = "3"
    phases.begin_push(client)
    with pytest.raises(PoolError, match="holds weight version 3, expected 4; it stays paused"):
        phases.end_push(client, 4)
    assert server.asleep == {"kv_cache"} and server.paused
    phases.begin_push(client)  # a push that failed is tried again, from discarded weights
    server.version = "4"
    phases.end_push(client, 4)
    assert not server.paused


def test_moves_out_of_turn_are_refused_before_the_server_hears_of_them(
    server: SleepyServer, client: ServerClient
) -> None:
    phases = PoolPhases()
    with pytest.raises(PoolError, match="is in no known phase and cannot be given its cache"):
        phases.end_push(client, 0)
    phases.begin_push(client)
    server.version = "0"
    phases.end_push(client, 0)
    heard = len(server.routes)
    with pytest.raises(PoolError, match="serves; it must be put to sleep before the next weight push"):
        phases.begin_push(client)
    with pytest.raises(
        PoolError, match="is serving and cannot be given its cache; it must be receiving weights"
    ):
        phases.end_push(client, 0)
    assert len(server.routes) == heard
    phases.make_room(client)
    with pytest.raises(PoolError, match="is asleep and cannot be given its cache"):
        phases.end_push(client, 0)


def test_a_move_that_the_server_did_not_make_is_not_believed(
    server: SleepyServer, client: ServerClient
) -> None:
    phases = PoolPhases()
    server.is_deaf = True
    with pytest.raises(PoolError, match="was not put to sleep: POST /sleep"):
        phases.begin_push(client)
    server.is_deaf = False
    phases.begin_push(client)
    server.is_deaf = True
    server.version = "1"
    with pytest.raises(PoolError, match=r"was not given its cache: POST /wake_up.* answered 'sleeping'"):
        phases.end_push(client, 1)
    assert phases.of(server.address) is Phase.UNSURE


def test_a_server_that_was_restarted_meanwhile_is_put_to_sleep_first(
    server: SleepyServer, client: ServerClient
) -> None:
    phases = PoolPhases()
    phases.begin_push(client)
    server.version = "1"
    phases.end_push(client, 1)
    phases.make_room(client)
    server.asleep, server.paused, server.version = set(), False, "default"
    phases.begin_push(client)
    assert server.asleep == {"kv_cache"} and server.paused


@pytest.mark.pool
def test_the_real_server_generates_nothing_between_waking_and_the_end_of_a_push(
    pool_server: PoolServer,
) -> None:
    phases = PoolPhases()
    with ServerClient(pool_server.address, pool_server.token, 30) as client:
        client.request("POST", "/resume")
        version = client.weight_version()
        phases.make_room(client)
        with pytest.raises(Unreachable):
            client.request("POST", GENERATE_ROUTE, ONE_TOKEN, timeout_s=1)
        phases.begin_push(client)
        with pytest.raises(Unreachable):
            client.request("POST", GENERATE_ROUTE, ONE_TOKEN, timeout_s=1)
        assert client.is_paused() and client.request("GET", "/is_sleeping")["is_sleeping"] is True
        with pytest.raises(
            PoolError, match=f"holds weight version {version}, expected 999999; it stays paused"
        ):
            phases.end_push(client, 999_999)
        assert client.is_paused()
        # No push here: the tags alone decide when vLLM resumes.
        client.request("POST", "/wake_up?tags=kv_cache")
        assert not client.is_paused()
        client.check_alive()
