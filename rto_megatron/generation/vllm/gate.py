"""The lock on every route of an inference server: a request without the run's bearer token ends here.

So does a request whose engine dies before it is answered: vLLM would keep it for ever, and its server with it.

Named on vLLM's command line (`--middleware rto_megatron.generation.vllm.gate.BearerGate`): vLLM's own `--api-key`
leaves the routes that pause the engine and replace its weights open.
"""

import asyncio
import hmac
import json
import os
import stat
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

from rto_megatron.errors import PoolError

TOKEN_FILE_VARIABLE = "RTO_POOL_TOKEN_FILE"
MIN_TOKEN_LENGTH = 32
_LOOK_S = 1.0  # between looks at the engine of a request that is not answered yet

# The types of the ASGI specification: a message is a mapping of anything by design.
Message = MutableMapping[str, object]
Scope = MutableMapping[str, object]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]


class Engine(Protocol):
    """What vLLM's client of the engine process tells; `errored` stays true once that process has ended.

    Example:
        if engine.errored: answer(503)
    """

    @property
    def errored(self) -> bool: ...


class _State(Protocol):
    engine_client: Engine


class _Server(Protocol):
    """`scope["app"]` of a request to vLLM's server."""

    state: _State


def read_token(token_file: Path) -> str:
    """Reads the bearer token of a pool.

    Raises:
        PoolError: the file is missing, readable by others, or holds no proper token.
    """
    if not token_file.is_file():
        raise PoolError(
            f"no token file at {token_file}; name the one that the pool was started with (rollout.token_file, or "
            "--token-file)"
        )
    if token_file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise PoolError(f"{token_file} is accessible to other users; run: chmod 600 {token_file}")
    token = token_file.read_text().strip()
    if len(token) < MIN_TOKEN_LENGTH:
        raise PoolError(
            f"{token_file} holds {len(token)} characters, expected at least {MIN_TOKEN_LENGTH}; "
            "delete it and start the pool again to have one made"
        )
    return token


class BearerGate:
    """ASGI middleware that passes lifespan events and requests with one right `Authorization` header.

    Example:
        app = BearerGate(app)
    """

    def __init__(self, app: Application, look_s: float = _LOOK_S) -> None:
        self._app = app
        self._look_s = look_s
        # A missing variable must stop the server from starting: open is worse than down.
        self._expected = b"Bearer " + read_token(Path(os.environ[TOKEN_FILE_VARIABLE])).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection, or answers 401 (HTTP) or close code 1008 (websocket)."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif not self._is_authorized(scope):
            await _refuse(scope, send)
        elif scope["type"] == "websocket":
            await self._app(scope, receive, send)
        else:
            await _serve(self._app, scope, receive, send, self._look_s)

    def _is_authorized(self, scope: Scope) -> bool:
        headers = scope.get("headers", ())
        assert isinstance(headers, list | tuple)
        given = [value for name, value in headers if name.lower() == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    error = "unauthorized: send the pool's token as 'Authorization: Bearer <token>'"
    await _answer(send, 401, error, (b"www-authenticate", b"Bearer"))


async def _serve(app: Application, scope: Scope, receive: Receive, send: Send, look_s: float) -> None:
    """Runs the application until it has answered, or until its engine is dead: then with 503 unless it had begun."""
    has_begun = False

    async def note(message: Message) -> None:
        nonlocal has_begun
        has_begun = True
        await send(message)

    limit = asyncio.timeout(None)
    try:
        async with limit:
            with _ended_with(cast(_Server, scope["app"]).state.engine_client, limit, look_s):
                await app(scope, receive, note)
    except TimeoutError:
        if not limit.expired():
            raise
        if not has_begun:
            await _answer(send, 503, "the engine of this server has ended, and the server ends too")


@contextmanager
def _ended_with(engine: Engine, limit: asyncio.Timeout, look_s: float) -> Iterator[None]:
    """Lets `limit` end what runs in it soon after the engine has ended, with time to say so itself."""
    loop = asyncio.get_running_loop()
    next_look: asyncio.TimerHandle

    def look() -> None:
        nonlocal next_look
        if engine.errored:
            limit.reschedule(loop.time())
        else:
            next_look = loop.call_later(look_s, look)

    next_look = loop.call_later(look_s, look)
    try:
        yield
    finally:
        next_look.cancel()


async def _answer(send: Send, status: int, error: str, *headers: Header) -> None:
    body = json.dumps({"error": error}).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})
