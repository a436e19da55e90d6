"""The lock on every route of an inference server: a request without the run's bearer token ends here.

Named on vLLM's command line (`--middleware rto_megatron.rollout.gate.BearerGate`): vLLM's own `--api-key`
leaves the routes that pause the engine and replace its weights open.
"""

import hmac
import json
import os
import stat
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path

from rto_megatron.errors import UserError

TOKEN_FILE_VARIABLE = "RTO_POOL_TOKEN_FILE"
MIN_TOKEN_LENGTH = 32

# The types of the ASGI specification: a message is a mapping of anything by design.
Message = MutableMapping[str, object]
Scope = MutableMapping[str, object]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


def read_token(token_file: Path) -> str:
    """Reads the bearer token of a pool.

    Raises:
        UserError: the file is missing, readable by others, or holds no proper token.
    """
    if not token_file.is_file():
        raise UserError(
            f"no token file at {token_file}; point rollout.token_file at the one the pool was started with"
        )
    if token_file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"{token_file} is accessible to other users; run: chmod 600 {token_file}")
    token = token_file.read_text().strip()
    if len(token) < MIN_TOKEN_LENGTH:
        raise UserError(
            f"{token_file} holds {len(token)} characters, expected at least {MIN_TOKEN_LENGTH}; "
            "delete it and start the pool again to have one made"
        )
    return token


class BearerGate:
    """ASGI middleware that passes lifespan events and requests with one right `Authorization` header."""

    def __init__(self, app: Application) -> None:
        self._app = app
        # A missing variable must stop the server from starting: open is worse than down.
        self._expected = b"Bearer " + read_token(Path(os.environ[TOKEN_FILE_VARIABLE])).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection, or answers 401 (HTTP) or close code 1008 (websocket)."""
        if scope["type"] == "lifespan" or self._is_authorized(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _refuse(send)

    def _is_authorized(self, scope: Scope) -> bool:
        headers = scope.get("headers", ())
        assert isinstance(headers, list | tuple)
        given = [value for name, value in headers if name.lower() == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


async def _refuse(send: Send) -> None:
    body = json.dumps(
        {"error": "unauthorized: send the pool's token as 'Authorization: Bearer <token>'"}
    ).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
