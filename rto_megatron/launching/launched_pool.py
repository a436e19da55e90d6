"""The pool that `rto launch` starts: which GPUs its servers take, and when ranks may go on with them."""

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer

from rto_megatron.config.overrides import as_override
from rto_megatron.config.plan import most_ranks
from rto_megatron.config.schema import EvaluateStage, ReinforcementStage
from rto_megatron.errors import MachineError, PoolError, UserError
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.generation.vllm.gate import read_token
from rto_megatron.generation.vllm.start.server import START_LIMIT_S, ServerOptions
from rto_megatron.launching.attempts import Start
from rto_megatron.launching.supervisor import StartingPool, started
from rto_megatron.launching.torchrun import RankFailure, kill_ranks
from rto_megatron.lifecycle.launched_beside import STARTING_VARIABLE
from rto_megatron.lifecycle.start_up import begin_part
from rto_megatron.planning.colocated_memory import put_to_sleep, shared_sizes
from rto_megatron.planning.placement import max_model_len, place, tensor_sizes
from rto_megatron.planning.shapes import hugging_face_folder

_POLL_S = 1.0
_LOOK_S = 0.1  # between looks at a pool that starts, and at ranks that are to end


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
    """A pool whose servers were started, as seen from the attempts of a run.

    Args:
        starting_file: is there until all servers are ready.

    Example:
        failure = pool.beside(lambda: start_ranks(2, [*arguments, *pool.arguments]))
    """

    def __init__(self, pool: StartingPool, token_file: Path, is_colocated: bool, starting_file: Path) -> None:
        self._pool = pool
        self._token_file = token_file
        self._is_colocated = is_colocated
        self._starting_file = starting_file

    @property
    def arguments(self) -> list[str]:
        """How the ranks find it."""
        return [
            f"rollout.servers={json.dumps(self._pool.addresses)}",
            as_override("rollout.token_file", self._token_file),
        ]

    def prepare(self, attempt: int) -> bool:
        """Waits for servers that are starting, or being started again; False when none is left.

        Those that are given up are not waited for.

        Raises:
            UserError: a server did not start.
        """
        supervisor = self._pool.ready()
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            answers = {address: self._answers(address) for address in supervisor.kept()}
            if all(answers.values()) or time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        if self._is_colocated and answers and all(answers.values()):
            put_to_sleep(list(answers), self._token_file)
        return any(answers.values())

    def require_before_ranks(self) -> None:
        """Waits for a pool on the ranks' own GPUs, whose servers measure the memory that is free while they start.

        Raises:
            UserError: a server did not start.
        """
        if not self._is_colocated:
            return
        begin_part("pool")
        if not self.prepare(1):
            raise PoolError("the pool's servers ended before a rank was started; their logs say why")

    def beside(self, start: Start) -> RankFailure | None:
        """Starts ranks while the servers may still be starting; the ranks wait for them (`await_pool`).

        Raises:
            UserError: a server did not start, and the ranks were ended.
        """
        os.environ[STARTING_VARIABLE] = str(self._starting_file.absolute())
        have_ended = threading.Event()
        watch = threading.Thread(
            target=self._let_ranks_go_on, args=(have_ended,), name="looks at the pool", daemon=True
        )
        watch.start()
        try:
            failure = start()
        finally:
            have_ended.set()
            watch.join()
        if self._pool.has_failed():
            self._pool.ready()
        return failure

    def _let_ranks_go_on(self, have_ended: threading.Event) -> None:
        while not self._pool.is_settled(_LOOK_S):
            if have_ended.is_set():
                return
        if not self._pool.has_failed():
            self._starting_file.unlink(missing_ok=True)
            return
        # More than once: ranks that were about to start are none yet.
        while not have_ended.wait(_LOOK_S):
            kill_ranks()

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
    """Servers for a stage, started; stopped at the end.

    Args:
        sizes: tensor-parallel size of each server.
        devices: the GPUs they share; empty on a machine without.
    """
    folder = config.run.dir / "pool"
    token_file = config.rollout.token_file or folder / "token"
    options = [
        ServerOptions(
            model=hugging_face_folder(config.models.policy),
            token_file=token_file,
            log_file=folder / f"server-{index}.log",
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
    starting_file = folder / "starting"
    with started(options, typer.echo) as pool:
        starting_file.touch()
        try:
            yield LaunchedPool(pool, token_file, config.rollout.colocated, starting_file)
        finally:
            starting_file.unlink(missing_ok=True)


def plan_pool(
    config: ReinforcementStage | EvaluateStage, gpus: int, ranks: int | None, choice: PoolChoice
) -> tuple[list[int], range]:
    """Tensor-parallel size of each server, and the GPUs they share: the last ones, or the ranks' own.

    Raises:
        UserError: servers and ranks have not enough of them.
    """
    if config.rollout.colocated:
        sizes = shared_sizes(config, gpus, ranks, choice.gpus, choice.servers, choice.tensor)
        return sizes, range(sum(sizes) if gpus else 0)
    sizes = _sizes(gpus, choice)
    free = gpus - sum(sizes)
    num_ranks = ranks or most_ranks(config.parallel, free)
    if gpus and num_ranks > free:
        raise MachineError(
            f"this machine has {gpus} GPUs, of which the pool's servers take {sum(sizes)}, and {num_ranks} ranks "
            "need one each; start fewer (--ranks, or another layout), give the pool fewer (--pool-gpus), or let both "
            "have the same ones in turn (rollout.colocated=true)"
        )
    return sizes, range(free, gpus) if gpus else range(0)


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
