"""Concurrent HTTP requests to inference servers, for generation."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace, TracebackType
from typing import Self

import aiohttp

from rto_megatron.generation.vllm.client.server_client import (
    Json,
    not_in_time,
    open_headers,
    parse_answer,
    unreachable,
)
from rto_megatron.platform.open_files import refuse_if_out_of_files

_IDLE_S = 3.0  # the server closes a connection that was idle for 5 s: ours must not be picked up just then
_NO_LIMIT = aiohttp.ClientTimeout()  # the one of `post` holds for both tries together


class GenerationHttp:
    """Posts of one event loop to any number of servers; an async context manager.

    Connections are kept for the next request. One that the server closes just when a request takes it costs that
    request a second try on a connection of its own, which is safe: a request's seed decides its tokens.

    Args:
        token: the pool's bearer token.
        timeout_s: limit of one request, queueing in the server included.

    Example:
        GenerationHttp(token, timeout_s=600.0)
    """

    def __init__(self, token: str, timeout_s: float) -> None:
        self._token = token
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        kept = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S)
        self._kept = self._open(kept)
        self._single = self._open(aiohttp.TCPConnector(limit=0, force_close=True))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._kept.close()
        await self._single.close()

    async def post(
        self, address: str, route: str, body: Mapping[str, Json], timeout_s: float | None = None
    ) -> dict[str, Json]:
        """Sends one request and returns the JSON object of its answer.

        Args:
            address: such as http://127.0.0.1:8000.
            route: path and query.
            body: JSON object.
            timeout_s: None takes the client's limit.

        Raises:
            Unreachable: no answer, or 503.
            RefusedError: an answer with another status than 200; ServerFailedError from 500 on.
            TooManyOpenFiles: this process can open no connection.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        with _named(address):
            async with asyncio.timeout(limit_s), await self._response(address + route, body) as response:
                status, content = response.status, await response.read()
        return parse_answer(address, route, status, content)

    async def text(self, address: str, route: str, timeout_s: float) -> str:
        """Gets what is not JSON, whatever its status.

        Raises:
            Unreachable: no answer.
        """
        url = address + route
        with _named(address):
            async with (
                asyncio.timeout(timeout_s),
                self._single.get(url, timeout=_NO_LIMIT, allow_redirects=False) as response,
            ):
                return await response.text()

    async def _response(self, url: str, body: Mapping[str, Json]) -> aiohttp.ClientResponse:
        reused: list[bool] = []
        try:
            return await _send(self._kept, url, body, reused)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not reused:
                raise
            return await _send(self._single, url, body, [])

    def _open(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        return aiohttp.ClientSession(
            connector=connector,
            headers=open_headers(self._token),
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[trace],
        )


@contextmanager
def _named(address: str) -> Iterator[None]:
    """Turns the client's errors into Unreachable, which names the server, unless they are this process's own."""
    try:
        yield
    except TimeoutError as error:
        raise not_in_time(address, error) from error
    except aiohttp.ClientConnectorError as error:
        refuse_if_out_of_files(error)
        raise unreachable(address, error.os_error) from error
    except aiohttp.ClientError as error:
        raise unreachable(address, error) from error


async def _note_reuse(
    session: aiohttp.ClientSession,
    context: SimpleNamespace,
    connection: aiohttp.TraceConnectionReuseconnParams,
) -> None:
    context.trace_request_ctx.append(True)


async def _send(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, Json], reused: list[bool]
) -> aiohttp.ClientResponse:
    """Returns when the answer begins; puts an entry into `reused` when the request took a kept connection."""
    return await session.post(
        url,
        json=body,
        timeout=_NO_LIMIT,
        allow_redirects=False,  # another address must not receive the token
        trace_request_ctx=reused,
    )
