"""The requests of one generation: whom to ask, when to ask someone else, and whom to give up."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rto_megatron.errors import UserError
from rto_megatron.generation.contract import StaleWeights, Unreachable
from rto_megatron.generation.vllm.client.answers import Answer
from rto_megatron.generation.vllm.client.http import GenerationHttp
from rto_megatron.generation.vllm.client.liveness import Liveness, prove_alive
from rto_megatron.generation.vllm.client.membership import Members
from rto_megatron.generation.vllm.client.server_client import GENERATE_ROUTE, ServerFailedError
from rto_megatron.platform.open_files import TooManyOpenFiles

_FIRST_BACKOFF_S = 0.5


class Dispatch:
    """Sends each request to the least loaded member; an async context manager that watches members meanwhile.

    A member that is taken out loses its requests to the others at once, and no answer of it is read any more.

    Args:
        http: carries the requests.
        members: whom to ask; servers that fail are taken out of it.
        retries: how often a request that failed on a live server is sent again.
        liveness: when a silent server has to prove itself.

    Example:
        Dispatch(http, members, retries=3, liveness=liveness).ask(body, read)
    """

    def __init__(self, http: GenerationHttp, members: Members, retries: int, liveness: Liveness) -> None:
        self._http = http
        self._members = members
        self._retries = retries
        self._liveness = liveness
        self._in_flight: dict[str, set[asyncio.Timeout]] = {address: set() for address in members.serving}
        self._heard: dict[str, float] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._watches: list[asyncio.Task[None]] = []
        self._background = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._background.__aenter__()
        self._heard = dict.fromkeys(self._in_flight, asyncio.get_running_loop().time())
        self._watches = [self._background.create_task(self._watch(one)) for one in self._in_flight]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in (*self._watches, *self._probes.values()):
            task.cancel()
        await self._background.__aexit__(kind, error, trace)

    async def ask[T](self, body: Answer, read: Callable[[str, Answer], T]) -> T:
        """Returns what `read` makes of the first answer of a live server, given its address.

        Raises:
            NoServersLeft, StaleWeights: no member is left (`Members.none_left`).
            TooManyOpenFiles: this process cannot ask anybody.
            UserError: the request was refused, or failed on live servers more than `retries` times.
        """
        num_failures = 0
        failed: set[str] = set()
        while True:
            address = self._least_loaded(failed)
            try:
                answer = await self._attempt(address, body)
                if answer is not None:
                    return read(address, answer)
            except StaleWeights as failure:
                self._take_out(address, failure)
            except (Unreachable, ServerFailedError):
                await self._probe(address)
                if address not in self._members.serving:
                    continue
                num_failures += 1
                if num_failures > self._retries:
                    raise
                failed.add(address)
                await asyncio.sleep(_FIRST_BACKOFF_S * 2 ** (num_failures - 1))

    def _least_loaded(self, failed: set[str]) -> str:
        serving = self._members.serving
        if not serving:
            raise self._members.none_left()
        untried = [address for address in serving if address not in failed]
        return min(untried or serving, key=lambda address: len(self._in_flight[address]))

    async def _attempt(self, address: str, body: Answer) -> Answer | None:
        """The server's answer, or None when it was taken out before."""
        in_flight = self._in_flight[address]
        scope = asyncio.timeout(None)
        try:
            async with scope:
                in_flight.add(scope)
                answer = await self._http.post(address, GENERATE_ROUTE, body)
        except TimeoutError:
            return None
        finally:
            in_flight.discard(scope)
        if address not in self._members.serving:
            return None
        self._heard[address] = asyncio.get_running_loop().time()
        return answer

    def _take_out(self, address: str, failure: UserError) -> None:
        if address not in self._members.serving:
            return
        self._members.take_out(address, failure)
        for scope in self._in_flight[address]:
            scope.reschedule(asyncio.get_running_loop().time())

    async def _watch(self, address: str) -> None:
        while address in self._members.serving:
            silence_s = asyncio.get_running_loop().time() - self._heard[address]
            if silence_s < self._liveness.interval_s:
                await asyncio.sleep(self._liveness.interval_s - silence_s)
            else:
                await self._probe(address)

    async def _probe(self, address: str) -> None:
        """Takes the server out unless it generates; calls for one server at a time share the probe."""
        if address not in self._members.serving:
            return
        probe = self._probes.get(address)
        if probe is None or probe.done():
            probe = self._probes[address] = self._background.create_task(self._require_alive(address))
        # Unlike awaiting it, this leaves it to the others when this request is cancelled.
        await asyncio.wait([probe])

    async def _require_alive(self, address: str) -> None:
        try:
            await prove_alive(self._http, address, self._liveness.timeout_s)
            self._heard[address] = asyncio.get_running_loop().time()
        except TooManyOpenFiles:
            raise  # ends the generation: it says nothing about the server
        except UserError as failure:
            self._take_out(address, failure)
