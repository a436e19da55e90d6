"""Rollouts from a pool of vLLM servers over HTTP: token ids in, token ids and log-probs out."""

import asyncio
from collections.abc import Sequence

from rto_megatron.errors import UserError
from rto_megatron.generation.contract import Arrived, Sampling, StaleWeights
from rto_megatron.generation.vllm.client.answers import (
    Answer,
    PromptTokens,
    prompt_tokens,
    request_body,
    to_rollout,
)
from rto_megatron.generation.vllm.client.dispatch import Dispatch
from rto_megatron.generation.vllm.client.http import GenerationHttp
from rto_megatron.generation.vllm.client.liveness import Liveness, failures_of
from rto_megatron.generation.vllm.client.membership import Announce, Members, silent
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.platform.open_files import connections_left
from rto_megatron.types import Metrics, Prompt, Rollout

# By a replica. vLLM batches no fewer on any GPU, and half as many on a CPU, where the rest wait in the server.
_REQUESTS_PER_SERVER = 256
_OUT_TIMEOUT_S = 5.0  # nobody else uses a server that is out, and the trainer waits for its word


class VllmPool:
    """One or more servers that hold the same weights; see `RolloutEngine` for the contract of `generate`.

    A server that dies or stops is taken out of `members`, and the others answer what it was asked. With the
    same weights, a response depends on the request's seed and not on who answers.

    Args:
        servers: addresses such as http://127.0.0.1:8000.
        token: the pool's bearer token (`gate.read_token`).
        timeout_s: limit of one request, queueing in the server included.
        retries: how often a request that failed on a live server is sent again.
        liveness: when a silent server has to prove itself.
        announce: receives one line for every server that goes or comes back.

    Raises:
        UserError: no server given.

    Example:
        VllmPool(servers, token, timeout_s=600.0).generate(prompts, sampling, version=3)
    """

    def __init__(
        self,
        servers: Sequence[str],
        token: str,
        timeout_s: float,
        retries: int = 3,
        liveness: Liveness = Liveness(),  # noqa: B008  (frozen)
        announce: Announce = silent,
    ) -> None:
        self.members = Members(servers, announce)
        self._token = token
        self._timeout_s = timeout_s
        self._retries = retries
        self._liveness = liveness
        self._prompt_tokens = PromptTokens()  # of all answers since they were last told

    def measured(self) -> Metrics:
        """Sums for the logs about the requests since the last call."""
        told, self._prompt_tokens = self._prompt_tokens, PromptTokens()
        return {"pool/prefix_hit_fraction": (float(told.num_cached), float(told.num_read))}

    def check_alive(self) -> None:
        """Has every server that serves generate a token, unless it is paused.

        Raises:
            UserError: naming the first server that does not.
        """
        timeouts = dict.fromkeys(self.members.serving, self._liveness.timeout_s)
        for failure in failures_of(timeouts, self._token, ServerClient.check_alive).values():
            raise failure

    def alive(self) -> tuple[str, ...]:
        """All configured servers that a push can be offered to: they generate, or are paused and answer.

        Servers that do not are taken out; those that are out and do stay out until `Members.settle`.
        """
        limit_s = self._liveness.timeout_s
        serving = self.members.serving
        timeouts = {
            address: limit_s if address in serving else min(limit_s, _OUT_TIMEOUT_S)
            for address in self.members.configured
        }
        failures = failures_of(timeouts, self._token, ServerClient.check_alive)
        for address, failure in failures.items():
            self.members.take_out(address, failure)
        return tuple(address for address in self.members.configured if address not in failures)

    def check_version(self, version: int) -> None:
        """Takes out servers that do not answer, or do not hold `version` ready for use.

        Raises:
            StaleWeights: none is left, and every one holds another version or is paused by a push that failed.
            NoServersLeft: none is left.
        """

        def check(client: ServerClient) -> None:
            held = client.weight_version()
            if held != str(version):
                raise StaleWeights(
                    f"inference server {client.address} holds weight version {held}, expected {version}; push the "
                    f"policy first"
                )
            if client.is_paused():
                raise StaleWeights(
                    f"inference server {client.address} is paused: the last weight push did not succeed; push the "
                    f"policy again"
                )

        timeouts = dict.fromkeys(self.members.serving, self._liveness.timeout_s)
        for address, failure in failures_of(timeouts, self._token, check).items():
            self.members.take_out(address, failure)
        if not self.members.serving:
            raise self.members.none_left()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`. `sampled_logprobs` are of the distribution that was sampled from: after
        temperature, top-p and the ban of end-of-sequence under `min_tokens`.

        Raises:
            NoServersLeft: the last server died.
            TooManyOpenFiles: the limit of open files leaves no connection.
        """
        return self.stream(prompts, sampling, version, lambda place, rollout: None)

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, arrived: Arrived
    ) -> list[Rollout]:
        """See `StreamingEngine.stream`, and `generate`."""
        self.check_version(version)
        return asyncio.run(self._generate_all(prompts, sampling, version, arrived))

    async def _generate_all(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, arrived: Arrived
    ) -> list[Rollout]:
        num_servers = len(self.members.serving)
        room = asyncio.Semaphore(min(_REQUESTS_PER_SERVER * num_servers, connections_left(num_servers)))
        http = GenerationHttp(self._token, self._timeout_s)
        dispatch = Dispatch(http, self.members, self._retries, self._liveness)

        async def one(index: int, prompt: Prompt) -> Rollout:
            def read(address: str, answer: Answer) -> Rollout:
                rollout = to_rollout(address, answer, prompt, sampling, version)
                self._prompt_tokens += prompt_tokens(answer)
                return rollout

            body = request_body(prompt, sampling, sampling.request_seed(version, index))
            async with room:
                rollout = await dispatch.ask(body, read)
            arrived(index, rollout)
            return rollout

        try:
            async with http, dispatch, asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index, prompt)) for index, prompt in enumerate(prompts)]
        except* UserError as errors:
            # One dead server fails many requests alike; the first error says it.
            raise _first_error(errors.exceptions) from None
        return [task.result() for task in tasks]


def _first_error(errors: Sequence[BaseException]) -> UserError:
    first = errors[0]
    if isinstance(first, BaseExceptionGroup):
        return _first_error(first.exceptions)
    assert isinstance(first, UserError)
    return first
