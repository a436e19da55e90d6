"""The bearer gate around a small ASGI application."""

import asyncio
from pathlib import Path

import pytest

from rto_megatron.errors import UserError
from rto_megatron.rollout.gate import (
    TOKEN_FILE_VARIABLE,
    BearerGate,
    Message,
    Receive,
    Scope,
    Send,
    read_token,
)

TOKEN = "a" * 64


def write_token(folder: Path, token: str = TOKEN, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_text(token + "\n")
    path.chmod(mode)
    return path


async def greet(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "application.reached"})


def talk(gate: BearerGate, kind: str, headers: list[tuple[bytes, bytes]]) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(gate({"type": kind, "path": "/pause", "headers": headers}, receive, send))
    return sent


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BearerGate:
    monkeypatch.setenv(TOKEN_FILE_VARIABLE, str(write_token(tmp_path)))
    return BearerGate(greet)


@pytest.mark.parametrize("kind", ["http", "websocket", "lifespan"])
def test_the_right_token_passes(gate: BearerGate, kind: str) -> None:
    headers = [] if kind == "lifespan" else [(b"authorization", f"Bearer {TOKEN}".encode())]
    assert talk(gate, kind, headers) == [{"type": "application.reached"}]


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
    assert b"unauthorized" in body["body"]  # type: ignore[operator]
    assert talk(gate, "websocket", headers) == [{"type": "websocket.close", "code": 1008}]


def test_a_gate_without_token_file_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_FILE_VARIABLE, raising=False)
    with pytest.raises(KeyError):
        BearerGate(greet)


def test_a_token_others_can_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="chmod 600"):
        read_token(write_token(tmp_path, mode=0o640))


def test_a_short_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 5 characters"):
        read_token(write_token(tmp_path, token="short"))


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no token file at"):
        read_token(tmp_path / "none")
