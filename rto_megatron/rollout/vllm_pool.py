"""Rollouts from a pool of vLLM servers over HTTP: token ids in, token ids and log-probs out."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import httpx

from rto_megatron.errors import UserError
from rto_megatron.rollout.client import (
    GENERATE_ROUTE,
    Json,
    ServerClient,
    ServerFailedError,
    UnreachableError,
    open_headers,
    parse_response,
    unreachable,
)
from rto_megatron.rollout.engine import Sampling, StaleWeights, request_seed
from rto_megatron.types import FinishReason, Prompt, Rollout

_REQUESTS_PER_SERVER = (
    128  # vLLM batches at most this many on a CPU, and queues the rest on a GPU as well as we can
)


class VllmPool:
    """One or more servers that hold the same weights; see `RolloutEngine` for the contract of `generate`.

    Args:
        servers: addresses such as http://127.0.0.1:8000.
        token: the pool's bearer token (`gate.read_token`).
        timeout_s: limit of one request, queueing in the server included.

    Raises:
        UserError: no server given.
    """

    def __init__(self, servers: Sequence[str], token: str, timeout_s: float) -> None:
        if not servers:
            raise UserError("rollout.servers is empty; start a pool (rto pool) and name its addresses")
        self._servers = tuple(servers)
        self._token = token
        self._timeout_s = timeout_s

    def check_alive(self) -> None:
        """Has every server generate a token, unless it is paused.

        Raises:
            UserError: naming the first server that does not.
        """
        for address in self._servers:
            with ServerClient(address, self._token, self._timeout_s) as client:
                client.check_alive()

    def check_version(self, version: int) -> None:
        """Makes sure that every server is running and holds `version`.

        Raises:
            StaleWeights: another version, or paused by a push that did not succeed.
            UserError: a server cannot be reached.
        """
        for address in self._servers:
            with ServerClient(address, self._token, self._timeout_s) as client:
                held = client.weight_version()
                if held != str(version):
                    raise StaleWeights(
                        f"inference server {address} holds weight version {held}, expected {version}; push "
                        f"the policy first"
                    )
                if client.is_paused():
                    raise StaleWeights(
                        f"inference server {address} is paused: the last weight push did not succeed; push "
                        f"the policy again"
                    )

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`. `sampled_logprobs` are of the model's own distribution: before
        temperature, top-p and the ban of end-of-sequence under `min_tokens`."""
        self.check_version(version)
        return asyncio.run(self._generate_all(prompts, sampling, version))

    async def _generate_all(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int
    ) -> list[Rollout]:
        load = _Load(self._servers)
        room = asyncio.Semaphore(_REQUESTS_PER_SERVER * len(self._servers))
        # A kept connection may be closed by the server just when the next request takes it.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            headers=open_headers(self._token), timeout=self._timeout_s, limits=limits
        ) as http:

            async def one(index: int, prompt: Prompt) -> Rollout:
                body = _request_body(prompt, sampling, request_seed(sampling.seed, version, index))
                async with room:
                    address, answer = await self._ask(http, load, body)
                return _to_rollout(address, answer, prompt, sampling, version)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(index, prompt)) for index, prompt in enumerate(prompts)]
            except* UserError as errors:
                # One dead server fails many requests alike; the first error says it.
                raise _first_error(errors.exceptions) from None
        return [task.result() for task in tasks]

    async def _ask(
        self, http: httpx.AsyncClient, load: "_Load", body: dict[str, Json]
    ) -> tuple[str, dict[str, Json]]:
        """Sends a request to the least loaded server, and once more to another one if that does not answer."""
        failed: set[str] = set()
        while True:
            address = load.take(failed)
            try:
                return address, await _post(http, address, body)
            except (UnreachableError, ServerFailedError):
                failed.add(address)
                if len(failed) == 2 or len(failed) == len(self._servers):
                    raise
            finally:
                load.give_back(address)


class _Load:
    """Requests in flight per server."""

    def __init__(self, servers: Iterable[str]) -> None:
        self._in_flight = dict.fromkeys(servers, 0)

    def take(self, excluded: set[str]) -> str:
        address = min(
            (one for one in self._in_flight if one not in excluded), key=self._in_flight.__getitem__
        )
        self._in_flight[address] += 1
        return address

    def give_back(self, address: str) -> None:
        self._in_flight[address] -= 1


async def _post(http: httpx.AsyncClient, address: str, body: dict[str, Json]) -> dict[str, Json]:
    try:
        response = await http.post(address + GENERATE_ROUTE, json=body)
    except httpx.TransportError as error:
        raise unreachable(address, error) from error
    return parse_response(address, GENERATE_ROUTE, response)


def _request_body(prompt: Prompt, sampling: Sampling, seed: int) -> dict[str, Json]:
    # The caller's eos ids are the only ones: without ignore_eos the server adds those of the model folder.
    return {
        "token_ids": list(prompt.token_ids),
        "sampling_params": {
            "max_tokens": sampling.max_tokens,
            "min_tokens": sampling.min_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            "stop_token_ids": list(sampling.eos_ids),
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
        },
    }


@dataclass(frozen=True)
class _Choice:
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    versions: tuple[str, ...]


def _to_rollout(
    address: str, answer: dict[str, Json], prompt: Prompt, sampling: Sampling, version: int
) -> Rollout:
    choice = _read_choice(address, answer)
    if choice.versions != (str(version),):
        raise StaleWeights(
            f"inference server {address} sampled prompt {prompt.id} with weight versions "
            f"{list(choice.versions)}, expected {version} alone; the weights changed during generation"
        )
    finish_reason = _finish_reason(address, choice, prompt, sampling)
    return Rollout(prompt.id, prompt.token_ids, choice.token_ids, choice.logprobs, finish_reason, version)


def _finish_reason(address: str, choice: _Choice, prompt: Prompt, sampling: Sampling) -> FinishReason:
    if choice.finish_reason == "stop":
        if choice.token_ids[-1] not in sampling.eos_ids:
            raise UserError(
                f"inference server {address} stopped prompt {prompt.id} at token {choice.token_ids[-1]}, "
                f"expected one of the end-of-sequence tokens {list(sampling.eos_ids)}"
            )
        return "stop"
    if choice.finish_reason == "length":
        if len(choice.token_ids) != sampling.max_tokens:
            raise UserError(
                f"inference server {address} cut prompt {prompt.id} ({len(prompt.token_ids)} tokens) after "
                f"{len(choice.token_ids)} of {sampling.max_tokens} tokens; start the pool with a "
                "larger --max-model-len"
            )
        return "length"
    raise UserError(
        f"inference server {address} ended prompt {prompt.id} with reason {choice.finish_reason!r}, "
        "expected stop or length; it was paused or stopped during generation"
    )


def _read_choice(address: str, answer: dict[str, Json]) -> _Choice:
    """Reads the response of vLLM's tokens-in, tokens-out route and refuses an incomplete one."""
    try:
        choice = _as_list(answer["choices"])[0]
        assert isinstance(choice, dict)
        token_ids = tuple(_as_int(one) for one in _as_list(choice["token_ids"]))
        content = choice["logprobs"]
        assert isinstance(content, dict)
        entries = [_as_dict(one) for one in _as_list(content["content"])]
        scored = tuple((_as_int(one["token_id"]), _as_float(one["logprob"])) for one in entries)
        spans = [_as_dict(one) for one in _as_list(choice["weight_versions"])]
        finish_reason = str(choice["finish_reason"])
        versions = tuple(str(span["version"]) for span in spans)
    except (KeyError, IndexError, AssertionError) as error:
        raise UserError(
            f"inference server {address} sent a response without {error or 'a part of the right type'}; "
            "rto-megatron needs the vLLM version of its requirements"
        ) from error
    if not token_ids or tuple(token_id for token_id, _ in scored) != token_ids:
        raise UserError(
            f"inference server {address} sent {len(token_ids)} tokens and log-probs of {len(scored)}, expected one each"
        )
    return _Choice(token_ids, tuple(logprob for _, logprob in scored), finish_reason, versions)


def _as_list(value: Json) -> list[Json]:
    assert isinstance(value, list)
    return value


def _as_dict(value: Json) -> dict[str, Json]:
    assert isinstance(value, dict)
    return value


def _as_int(value: Json) -> int:
    assert isinstance(value, int)
    return value


def _as_float(value: Json) -> float:
    assert isinstance(value, float | int)
    return float(value)


def _first_error(errors: Sequence[BaseException]) -> UserError:
    first = errors[0]
    if isinstance(first, BaseExceptionGroup):
        return _first_error(first.exceptions)
    assert isinstance(first, UserError)
    return first
