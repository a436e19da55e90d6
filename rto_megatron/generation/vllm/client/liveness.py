"""Whether a server still generates: health routes answer for engines that are dead or stopped."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rto_megatron.errors import UserError
from rto_megatron.generation.contract import Unreachable
from rto_megatron.generation.vllm.client.http import GenerationHttp
from rto_megatron.generation.vllm.client.server_client import (
    GENERATE_ROUTE,
    ONE_TOKEN,
    RefusedError,
    ServerClient,
)
from rto_megatron.platform.open_files import TooManyOpenFiles

_SECOND_TRY_S = 1.0
_TOKEN_COUNTER = "vllm:generation_tokens_total"


@dataclass(frozen=True)
class Liveness:
    """When a server has to prove itself.

    Args:
        interval_s: it is asked for one token when it answered nothing for so long.
        timeout_s: of that one token; shorter than the interval, so that a silent server is out before two.

    Example:
        Liveness(interval_s=30, timeout_s=15)
    """

    interval_s: float = 30.0
    timeout_s: float = 15.0


async def prove_alive(http: GenerationHttp, address: str, timeout_s: float) -> None:
    """Returns when the server generated a token, for us or for someone else.

    Raises:
        UserError: it did neither within `timeout_s`, or refused twice.
        TooManyOpenFiles: it could not be asked.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    counting = asyncio.create_task(_generated_tokens(http, address, timeout_s))
    try:
        await _one_token(http, address, timeout_s)
        return
    except TooManyOpenFiles:
        raise
    except UserError as failure:
        first = failure
    finally:
        counting.cancel()
        (before,) = await asyncio.gather(counting, return_exceptions=True)
    if loop.time() - started < timeout_s / 2:
        # Refused at once: a connection can be lost on the way to a server that is well.
        await asyncio.sleep(min(_SECOND_TRY_S, timeout_s))
        await _one_token(http, address, timeout_s)
        return
    # A probe can wait behind other requests for longer than its limit while the server works on them.
    after = await _generated_tokens(http, address, timeout_s)
    if before is None or isinstance(before, BaseException) or after is None or after <= before:
        raise first


async def _one_token(http: GenerationHttp, address: str, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            # With a limit of its own that never comes first: its advice would be about generation.
            answer = await http.post(address, GENERATE_ROUTE, ONE_TOKEN, 2 * timeout_s)
    except TimeoutError as late:
        raise Unreachable(
            f"inference server {address} did not generate one token within {timeout_s:g} s"
        ) from late
    if not answer.get("choices"):
        raise RefusedError(f"inference server {address} generated nothing when asked for one token")


async def _generated_tokens(http: GenerationHttp, address: str, timeout_s: float) -> float | None:
    """Tokens the server's engine has generated since it started, or None without an answer."""
    try:
        metrics = await http.text(address, "/metrics", timeout_s)
    except Unreachable:
        return None
    lines = [line for line in metrics.splitlines() if line.startswith(_TOKEN_COUNTER)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines) if lines else None


def failures_of(
    timeouts: Mapping[str, float], token: str, check: Callable[[ServerClient], object]
) -> dict[str, UserError]:
    """Checks servers side by side; address -> error of those that did not pass.

    Args:
        timeouts: address -> seconds for each request of the check.

    Raises:
        TooManyOpenFiles: this process could not ask one of them.
    """

    def failure_of(address: str) -> UserError | None:
        try:
            with ServerClient(address, token, timeouts[address]) as client:
                check(client)
        except TooManyOpenFiles:
            raise
        except UserError as failure:
            return failure
        return None

    with ThreadPoolExecutor(max(1, len(timeouts)), thread_name_prefix="pool-check") as threads:
        failures = zip(timeouts, threads.map(failure_of, timeouts), strict=True)
        return {address: failure for address, failure in failures if failure is not None}
