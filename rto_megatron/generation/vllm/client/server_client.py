"""HTTP to one inference server: the bearer token, and errors that name the address and what to do.

A server is vLLM 0.32 with its tokens-in, tokens-out route and the routes of its development mode
(`server.py`).
"""

import functools
import json
import ssl
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import httpx

from rto_megatron.errors import PoolError
from rto_megatron.generation.contract import Unreachable
from rto_megatron.platform.open_files import refuse_if_out_of_files

GENERATE_ROUTE = "/inference/v1/generate"
_SHOWN_CHARACTERS = 1200

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]

ONE_TOKEN: Mapping[str, Json] = {"token_ids": [0], "sampling_params": {"max_tokens": 1}}


class RefusedError(PoolError):
    """The server answered with an HTTP error."""


class ServerFailedError(RefusedError):
    """Another error of the server's own (5xx): its engine may be dead, another server may still answer."""


def open_headers(token: str) -> dict[str, str]:
    """Headers of every request to a pool."""
    return {"Authorization": f"Bearer {token}"}


def not_in_time(address: str, error: Exception) -> Unreachable:
    """The error for a request that ran into its time limit."""
    return Unreachable(
        f"inference server {address} did not answer in time ({type(error).__name__}); look at its log, "
        "and raise rollout.request_timeout_s or rollout.sync_timeout_s if it is only slow"
    )


def unreachable(address: str, error: Exception) -> Unreachable:
    """The error for a request that got no answer."""
    return Unreachable(
        f"cannot reach inference server {address} ({type(error).__name__}: {error}); "
        "check that the pool is running (rto pool) and that rollout.servers names it"
    )


def parse_answer(address: str, route: str, status: int, content: bytes) -> dict[str, Json]:
    """Returns the JSON object of an answer with status 200.

    Raises:
        Unreachable: status 503, with the server's own words.
        RefusedError: another status, with the server's own words.
    """
    if status == 401:
        raise RefusedError(
            f"inference server {address} refused the token; rollout.token_file must be the file the pool "
            f"was started with"
        )
    if status != 200:
        said = content.decode(errors="replace")[:_SHOWN_CHARACTERS]
        message = f"inference server {address} answered {status} to {route}: {said}"
        if status == 503:
            raise Unreachable(message)
        raise (ServerFailedError if status >= 500 else RefusedError)(message)
    if not content:
        return {}
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise RefusedError(
            f"inference server {address} answered {route} with something that is not JSON: {error}"
        ) from error
    return parsed if isinstance(parsed, dict) else {"value": parsed}


@functools.cache
def certificates() -> ssl.SSLContext:
    """The system's, read once: it takes 40 ms, which each client would spend before each generation."""
    return httpx.create_ssl_context()


class ServerClient:
    """Blocking requests to one server, for control and for single tokens.

    Example:
        ServerClient("http://127.0.0.1:8000", token, timeout_s=30.0).check_alive()
    """

    def __init__(self, address: str, token: str, timeout_s: float) -> None:
        self.address = address
        # No kept connections: after an error in a route the server closes the one it came on, and the next
        # request on it would fail.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(
            base_url=address,
            headers=open_headers(token),
            timeout=timeout_s,
            limits=limits,
            verify=certificates(),
            trust_env=False,  # a proxy would receive the token
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def request(
        self, method: str, route: str, body: Mapping[str, Json] | None = None, timeout_s: float | None = None
    ) -> dict[str, Json]:
        """Sends one request.

        Args:
            method: "GET" or "POST".
            route: path and query.
            body: JSON object.
            timeout_s: None takes the client's limit.

        Raises:
            Unreachable: no answer, or 503.
            RefusedError: an answer with another status than 200.
            TooManyOpenFiles: this process can open no connection.
        """
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else httpx.Timeout(timeout_s)
        try:
            response = self._http.request(method, route, json=body, timeout=timeout)
        except httpx.TimeoutException as error:
            raise not_in_time(self.address, error) from error
        except httpx.TransportError as error:
            refuse_if_out_of_files(error)
            raise unreachable(self.address, error) from error
        return parse_answer(self.address, route, response.status_code, response.content)

    def weight_version(self) -> str:
        """The version label of the weights the server holds; "default" before the first push."""
        return str(self.request("GET", "/weight_info")["weight_version"])

    def is_paused(self) -> bool:
        """Whether the engine schedules nothing, as during a weight push and after a failed one."""
        return self.request("GET", "/is_paused")["is_paused"] is True

    def num_workers(self) -> int:
        """Worker processes of the server, each of which receives weights."""
        count = self.request("GET", "/get_world_size")["world_size"]
        if not isinstance(count, int):
            raise RefusedError(f"inference server {self.address} has {count!r} workers, expected a number")
        return count

    def check_alive(self) -> None:
        """Generates one token, unless the engine is paused: /health can answer for a dead engine.

        Raises:
            UserError: the server does not generate.
        """
        if not self.is_paused():
            self.request("POST", GENERATE_ROUTE, ONE_TOKEN)

    def prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        """Log-probs in nats of token_ids[1:], each given the tokens before it.

        Raises:
            UserError: the answer holds another number of them.
        """
        sampling: dict[str, Json] = {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
            "detokenize": False,
        }
        body: dict[str, Json] = {"token_ids": list(token_ids), "sampling_params": sampling}
        entries = self.request("POST", GENERATE_ROUTE, body)["prompt_logprobs"]
        if not isinstance(entries, list) or len(entries) != len(token_ids):
            raise RefusedError(
                f"inference server {self.address} returned no log-probs for each of {len(token_ids)} "
                f"prompt tokens"
            )
        logprobs = []
        for token_id, entry in zip(token_ids[1:], entries[1:], strict=True):
            of_token = entry.get(str(token_id)) if isinstance(entry, dict) else None
            logprob = of_token.get("logprob") if isinstance(of_token, dict) else None
            if not isinstance(logprob, float | int):
                raise RefusedError(
                    f"inference server {self.address} returned no log-prob for prompt token {token_id}"
                )
            logprobs.append(float(logprob))
        return logprobs
