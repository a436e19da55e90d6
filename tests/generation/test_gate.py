"""The bearer gate around a small ASGI application."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from rto_megatron.errors import PoolError
from rto_megatron.generation.vllm.gate import (
    TOKEN_FILE_VARIABLE,
    Application,
    BearerGate,
    Message,
    Receive,
    Scope,
    Send,
    read_token,
)

TOKEN = "a" * 64
AUTHORIZED = [(b"authorization", f"Bearer {TOKEN}".encode())]

LOOK_S = 0.05  # between looks at the engine


@dataclass
class Engine:
    """What the gate sees of an engine."""

    errored: bool = False


def scope_of(kind: str, headers: Sequence[tuple[bytes, bytes]], engine: Engine) -> Scope:
    app = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
    return {"type": kind, "path": "/pause", "headers": headers, "app": app}


def write_token(folder: Path, token: str = TOKEN, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_text(token + "\n")
    path.chmod(mode)
    return path


async def greet(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "application.reached"})


async def hear(gate: BearerGate, scope: Scope) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {}

    async def send(message: Message) -> None:
        sent.append(message)

    await gate(scope, receive, send)
    return sent


def talk(gate: BearerGate, kind: str, headers: Sequence[tuple[bytes, bytes]]) -> list[Message]:
    return asyncio.run(hear(gate, scope_of(kind, headers, Engine())))


@pytest.fixture(autouse=True)
def token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_FILE_VARIABLE, str(write_token(tmp_path)))


@pytest.fixture
def gate() -> BearerGate:
    return BearerGate(greet)


@pytest.mark.parametrize("kind", ["http", "websocket", "lifespan"])
def test_the_right_token_passes(gate: BearerGate, kind: str) -> None:
    assert talk(gate, kind, [] if kind == "lifespan" else AUTHORIZED) == [{"type": "application.reached"}]


@pytest.mark.parametrize(
    "values",
    [
        [],
        [b"Bearer " + b"b" * 64],
        [b"Bearer " + b"a" * 63],
        [b"a" * 64],
        [b"Bearer " + b"a" * 64] * 2,
        [b""],
    ],
)
def test_anything_else_is_refused_before_the_application(gate: BearerGate, values: list[bytes]) -> None:
    headers = [(b"authorization", value) for value in values]
    start, body = talk(gate, "http", headers)
    assert start["status"] == 401
    assert isinstance(body["body"], bytes) and b"unauthorized" in body["body"]
    assert talk(gate, "websocket", headers) == [{"type": "websocket.close", "code": 1008}]


def test_a_gate_without_token_file_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_FILE_VARIABLE, raising=False)
    with pytest.raises(KeyError):
        BearerGate(greet)


def test_a_token_others_can_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="chmod 600"):
        read_token(write_token(tmp_path, mode=0o640))


def test_a_short_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="holds 5 characters"):
        read_token(write_token(tmp_path, token="short"))


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="no token file at"):
        read_token(tmp_path / "none")


STARTED: Message = {"type": "http.response.start", "status": 200, "headers": []}
PART: Message = {"type": "http.response.body", "body": b"part", "more_body": True}


class Waiting:
    """An application that sends what it is given and then waits, for ever unless told how long."""

    def __init__(self, *messages: Message, seconds: float = 3600) -> None:
        self._messages = messages
        self._seconds = seconds
        self.waits = asyncio.Event()
        self.was_cancelled = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for message in self._messages:
            await send(message)
        self.waits.set()
        try:
            await asyncio.sleep(self._seconds)
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        await send({"type": "http.response.body", "body": b"rest"})


def ask(app: Application, engine: Engine, kind: str = "http") -> list[Message]:
    async def within() -> list[Message]:
        async with asyncio.timeout(60):
            return await hear(BearerGate(app, LOOK_S), scope_of(kind, AUTHORIZED, engine))

    return asyncio.run(within())


def test_a_request_whose_engine_is_dead_is_given_up_and_told_so() -> None:
    app = Waiting()
    start, body = ask(app, Engine(errored=True))
    assert (start["type"], start["status"]) == ("http.response.start", 503)
    assert isinstance(body["body"], bytes)
    assert "engine of this server has ended" in json.loads(body["body"])["error"]
    assert app.was_cancelled


def test_an_answer_that_had_begun_when_the_engine_died_is_cut_off() -> None:
    app = Waiting(STARTED, PART)
    assert ask(app, Engine(errored=True)) == [STARTED, PART]
    assert app.was_cancelled


def test_an_application_that_knows_its_engine_dead_answers_itself() -> None:
    app = Waiting(seconds=0.01)
    assert ask(app, Engine(errored=True)) == [{"type": "http.response.body", "body": b"rest"}]


def test_a_slow_answer_of_a_living_engine_arrives_whole() -> None:
    app = Waiting(STARTED, PART, seconds=0.3)  # some looks at the engine
    assert ask(app, Engine()) == [STARTED, PART, {"type": "http.response.body", "body": b"rest"}]


@pytest.mark.parametrize("is_dead", [False, True])
def test_a_cancellation_from_outside_reaches_the_application(is_dead: bool) -> None:
    app = Waiting()

    async def cancel() -> None:
        serving = asyncio.create_task(
            hear(BearerGate(app, LOOK_S), scope_of("http", AUTHORIZED, Engine(is_dead)))
        )
        await app.waits.wait()
        serving.cancel()
        await serving

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())
    assert app.was_cancelled


@pytest.mark.parametrize("error", [TimeoutError("its own"), ValueError("its own")])
def test_an_error_of_the_application_stays_its_own(error: Exception) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    with pytest.raises(type(error), match="its own"):
        ask(fail, Engine())


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
def test_other_connections_are_left_to_the_server(kind: str) -> None:
    app = Waiting(seconds=0.3)
    assert ask(app, Engine(errored=True), kind) == [{"type": "http.response.body", "body": b"rest"}]
