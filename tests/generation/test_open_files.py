"""A low limit of open files slows requests or is named; it never costs a server."""

import asyncio
import os
import resource
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
from generation.canned import Answer, CannedServer, canned_servers, choice
from ranks import run_ranks

from rto_megatron.generation.contract import Sampling
from rto_megatron.generation.vllm.client.dispatch import Dispatch
from rto_megatron.generation.vllm.client.http import GenerationHttp
from rto_megatron.generation.vllm.client.liveness import Liveness, failures_of
from rto_megatron.generation.vllm.client.membership import Members
from rto_megatron.generation.vllm.client.server_client import GENERATE_ROUTE, ONE_TOKEN, ServerClient
from rto_megatron.generation.vllm.client.vllm_pool import VllmPool
from rto_megatron.platform.open_files import TooManyOpenFiles, connections_left, raise_file_limit
from rto_megatron.types import Prompt

SAMPLING = Sampling(max_tokens=3, eos_ids=(2,), seed=5)
LIVENESS = Liveness(interval_s=2.0, timeout_s=1.0)


def answer(seed: int | None) -> Answer:
    return choice([7, 8, 9])


@pytest.fixture
def servers() -> Iterator[list[CannedServer]]:
    """Eight that are well, in this process; those who ask them are forked, with limits of their own."""
    with canned_servers() as start:
        servers = [start(answer) for _ in range(8)]
        # A process's first client reads modules and certificates from files.
        failures_of({servers[0].address: 5.0}, "t", ServerClient.check_alive)
        yield servers


def limit_to(more: int) -> None:
    """Lets this process open so many more files, and no way to raise that."""
    wanted = len(os.listdir("/proc/self/fd")) + more
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))


def test_the_soft_limit_is_raised_to_the_hard_one_for_children_too() -> None:
    def raised() -> tuple[int, int, str]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 5000))
        told = raise_file_limit()
        return told, resource.getrlimit(resource.RLIMIT_NOFILE)[0], os.popen("ulimit -n").read().strip()

    assert run_ranks(1, raised) == [(5000, 5000, "5000")]


def test_requests_of_many_servers_fit_into_a_low_limit(servers: list[CannedServer]) -> None:
    """8 x 256 requests could take 2048 connections."""
    addresses = [server.address for server in servers]
    prompts = [Prompt(f"prompt-{index}", (1, 5)) for index in range(400)]

    def generate() -> tuple[int, list[str]]:
        said: list[str] = []
        limit_to(64 + 16 + 80)
        pool = VllmPool(addresses, "t", 30.0, 3, LIVENESS, said.append)
        return len(pool.generate(prompts, SAMPLING, 4)), [*said, *pool.members.out]

    assert run_ranks(1, generate) == [(400, [])]


def test_a_limit_that_leaves_nothing_is_named_before_a_request() -> None:
    def left() -> str:
        limit_to(70)
        with pytest.raises(TooManyOpenFiles) as refused:
            connections_left(8)
        return str(refused.value)

    (said,) = run_ranks(1, left)
    assert "which leaves none for requests to 8 inference servers; raise the hard limit (ulimit -Hn" in said


@contextmanager
def no_file_left() -> Iterator[None]:
    """While inside, nothing can be opened."""
    held: list[int] = []
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        yield
    finally:
        for one in held:
            os.close(one)


def _post(address: str) -> None:
    async def run() -> None:
        async with GenerationHttp("t", 5) as http:
            with no_file_left():
                await http.post(address, GENERATE_ROUTE, ONE_TOKEN)

    asyncio.run(run())


def _check(address: str) -> None:
    with no_file_left():
        failures_of({address: 5.0}, "t", ServerClient.check_alive)


@pytest.mark.parametrize("ask", [_post, _check])
@pytest.mark.parametrize("host", ["127.0.0.1", "a-server.invalid"])
def test_a_process_that_can_open_nothing_does_not_blame_the_server(
    ask: Callable[[str], None], host: str, servers: list[CannedServer]
) -> None:
    """A look-up of a name fails without saying why."""
    address = servers[0].address.replace("127.0.0.1", host)

    def said() -> str:
        limit_to(40)
        with pytest.raises(TooManyOpenFiles) as refused:
            ask(address)
        return str(refused.value)

    (text,) = run_ranks(1, said)
    assert "this process may open no more files" in text and "the limit of ulimit -n is" in text


async def _ask(dispatch: Dispatch) -> None:
    await dispatch.ask(dict(ONE_TOKEN), lambda address, answer: answer)


async def _stay_silent(dispatch: Dispatch) -> None:
    await asyncio.sleep(30)


@pytest.mark.parametrize("act", [_ask, _stay_silent])
def test_requests_and_probes_that_find_no_file_end_and_take_no_server_out(
    act: Callable[[Dispatch], Awaitable[None]], servers: list[CannedServer]
) -> None:
    members = Members([server.address for server in servers])

    async def run() -> None:
        http = GenerationHttp("t", 30)
        async with http, Dispatch(http, members, 3, Liveness(0.2, 0.1)) as dispatch:
            with no_file_left():
                await act(dispatch)

    def kinds() -> tuple[set[str], tuple[str, ...]]:
        limit_to(40)
        with pytest.raises(ExceptionGroup) as refused:
            asyncio.run(run())
        return {type(one).__name__ for one in refused.value.exceptions}, members.serving

    assert run_ranks(1, kinds) == [({"TooManyOpenFiles"}, members.configured)]


def test_a_pool_that_cannot_be_asked_for_its_version_keeps_its_servers(servers: list[CannedServer]) -> None:
    addresses = [server.address for server in servers]

    def generate() -> tuple[str, ...]:
        limit_to(64 + 16 + 24)
        pool = VllmPool(addresses, "t", 30.0, 3, LIVENESS)
        with no_file_left(), pytest.raises(TooManyOpenFiles):
            pool.generate([Prompt("prompt", (1, 5))], SAMPLING, 4)
        return pool.members.serving

    assert run_ranks(1, generate) == [tuple(addresses)]
