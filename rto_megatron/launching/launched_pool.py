"""The pool that `rto launch` starts: which GPUs its servers take, and when they are ready for the ranks."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer

from rto_megatron.config.overrides import as_override
from rto_megatron.config.schema import EvaluateStage, ReinforcementStage
from rto_megatron.errors import MachineError, UserError
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.generation.vllm.gate import read_token
from rto_megatron.generation.vllm.start.server import ServerOptions
from rto_megatron.launching.supervisor import Supervisor, supervised
from rto_megatron.planning.colocated_memory import put_to_sleep, shared_sizes
from rto_megatron.planning.placement import max_model_len, place, tensor_sizes
from rto_megatron.planning.shapes import hugging_face_folder

_POLL_S = 1.0
_BACK_WITHIN_S = 600.0  # a server that ended needs so long to start again, at the most


@dataclass(frozen=True)
class PoolChoice:
    """The pool's options of the command line; None: what fits.

    Example:
        PoolChoice(gpus=4, servers=2, tensor="2")
    """

    gpus: int | None
    servers: int | None
    tensor: str


class LaunchedPool:
    """A running pool, as seen from the attempts of a run.

    Example:
        if pool.prepare(attempt=1): start(pool.arguments)
    """

    def __init__(self, pool: Supervisor, token_file: Path, is_colocated: bool) -> None:
        self._pool = pool
        self._token_file = token_file
        self._is_colocated = is_colocated

    @property
    def arguments(self) -> list[str]:
        """How the ranks find it."""
        return [
            f"rollout.servers={json.dumps(self._pool.addresses)}",
            as_override("rollout.token_file", self._token_file),
        ]

    def prepare(self, attempt: int) -> bool:
        """Waits for servers that are being started again; False when none is left."""
        deadline = time.monotonic() + _BACK_WITHIN_S
        while not all(answers := [self._answers(address) for address in self._pool.addresses]):
            if not self._pool.is_running() or time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        if self._is_colocated and all(answers):
            put_to_sleep(self._pool.addresses, self._token_file)
        return any(answers)

    def _answers(self, address: str) -> bool:
        with ServerClient(address, read_token(self._token_file), timeout_s=2) as client:
            try:
                client.request("GET", "/health", timeout_s=2)
            except UserError:
                return False
        return True


@contextmanager
def launched_pool(
    config: ReinforcementStage | EvaluateStage, sizes: Sequence[int], devices: range
) -> Iterator[LaunchedPool]:
    """Servers for a stage, started and ready; stopped at the end.

    Args:
        sizes: tensor-parallel size of each server.
        devices: the GPUs they share; empty on a machine without.
    """
    token_file = config.rollout.token_file or config.run.dir / "pool" / "token"
    options = [
        ServerOptions(
            model=hugging_face_folder(config.models.policy),
            token_file=token_file,
            log_file=config.run.dir / "pool" / f"server-{index}.log",
            dtype=config.precision.dtype,
            fp32_parts=config.precision.fp32_parts,
            max_model_len=max_model_len(config),
            tensor_parallel=size,
            gpu_memory_fraction=config.rollout.gpu_memory_fraction,
            can_sleep=config.rollout.colocated,
            visible_gpus=visible,
        )
        for index, (size, visible) in enumerate(zip(sizes, place(list(sizes), devices), strict=True))
    ]
    with supervised(options, typer.echo) as pool:
        yield LaunchedPool(pool, token_file, config.rollout.colocated)


def plan_pool(
    config: ReinforcementStage | EvaluateStage, gpus: int, ranks: int | None, choice: PoolChoice
) -> tuple[list[int], range]:
    """Tensor-parallel size of each server, and the GPUs they share: the last ones, or the ranks' own."""
    if config.rollout.colocated:
        sizes = shared_sizes(config, gpus, ranks, choice.gpus, choice.servers, choice.tensor)
        return sizes, range(sum(sizes) if gpus else 0)
    sizes = _sizes(gpus, choice)
    return sizes, range(gpus - sum(sizes), gpus) if gpus else range(0)


def _sizes(gpus: int, choice: PoolChoice) -> list[int]:
    if not gpus:
        return tensor_sizes(choice.tensor, choice.servers, None)
    is_counted = choice.servers is not None or "," in choice.tensor
    sizes = tensor_sizes(
        choice.tensor, choice.servers, choice.gpus or (None if is_counted else max(1, gpus // 2))
    )
    if not 0 < sum(sizes) < gpus:
        raise MachineError(
            f"this machine has {gpus} GPUs, and the pool's servers would take {sum(sizes)}; the trainer and the pool "
            "need at least one each"
        )
    return sizes
