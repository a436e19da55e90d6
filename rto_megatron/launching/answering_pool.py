"""A pool that answers a benchmark: servers that are started with a folder's own weights, or that run already."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import typer

from rto_megatron.errors import PoolError
from rto_megatron.generation.contract import RolloutEngine
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.generation.vllm.client.vllm_pool import VllmPool
from rto_megatron.generation.vllm.gate import read_token
from rto_megatron.generation.vllm.start.server import ServerOptions
from rto_megatron.launching.supervisor import LOADED_VERSION, supervised
from rto_megatron.planning.placement import place, tensor_sizes

_REQUEST_TIMEOUT_S = 24 * 3600.0  # a whole benchmark queues in the servers
_ASK_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class AnsweringPool:
    """An engine, and the version of the weights that it holds.

    Example:
        pool.engine.generate(prompts, sampling, pool.version)
    """

    engine: RolloutEngine
    version: int


@contextmanager
def started_pool(
    one: ServerOptions, num_servers: int | None, tensor_parallel: str
) -> Iterator[AnsweringPool]:
    """Servers of this machine, stopped at the end.

    Args:
        one: what all have in common; it must load its weights.
        num_servers: None: as many as the GPUs hold.
        tensor_parallel: of each server, as `rto pool` takes it.

    Raises:
        UserError: they do not fit the GPUs, or one does not start.
    """
    assert one.load_weights, "nobody pushes weights to these servers"
    gpus = torch.cuda.device_count()
    sizes = tensor_sizes(tensor_parallel, num_servers, gpus or None)
    log = one.log_file
    options = [
        replace(one, log_file=log.with_stem(f"{log.stem}-{index}"), tensor_parallel=size, visible_gpus=gpu)
        for index, (size, gpu) in enumerate(zip(sizes, place(sizes, range(gpus)), strict=True))
    ]
    with supervised(options, typer.echo) as pool:
        yield AnsweringPool(_engine(pool.addresses, one.token_file), LOADED_VERSION)


def running_pool(addresses: Sequence[str], token_file: Path) -> AnsweringPool:
    """Servers that run already: of `rto pool --load-weights`, or of a trainer.

    Raises:
        PoolError: they hold different weights, or weights that nobody loaded or pushed.
        UserError: one does not answer.
    """
    held = {}
    for address in addresses:
        with ServerClient(address, read_token(token_file), _ASK_TIMEOUT_S) as client:
            held[address] = client.weight_version()
    if len(set(held.values())) > 1:
        raise PoolError(f"the servers hold different weights, {held}; name those of one pool")
    version = next(iter(held.values()))
    if not version.isdecimal():
        raise PoolError(
            f"{', '.join(held)} hold weights of version {version!r}: random ones, until a trainer pushes. Start the "
            "pool with `rto pool MODEL --load-weights`, or let this command start one"
        )
    return AnsweringPool(_engine(addresses, token_file), int(version))


def _engine(addresses: Sequence[str], token_file: Path) -> VllmPool:
    return VllmPool(addresses, read_token(token_file), _REQUEST_TIMEOUT_S, announce=typer.echo)
