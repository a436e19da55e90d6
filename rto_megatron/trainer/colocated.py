"""A trainer that shares its GPUs with the pool: who has the memory when."""

import torch

from rto_megatron.errors import UserError
from rto_megatron.parallel.topology import Topology
from rto_megatron.rollout.client import UnreachableError
from rto_megatron.rollout.liveness import failures_of
from rto_megatron.rollout.open_files import TooManyOpenFiles
from rto_megatron.rollout.phases import PoolPhases
from rto_megatron.rollout.vllm_pool import VllmPool


class SharedGpus:
    """Turns of trainer and pool on the same GPUs; all ranks must call its methods together.

    Models, gradients and optimizers of the trainer stay where they are in every phase; what changes hands is the
    memory of activations, and of the pool's weights and cache.

    Args:
        pool: on the lead, whose servers `phases` moves; not used elsewhere.
        timeout_s: of one move of one server.
    """

    def __init__(
        self, topology: Topology, pool: VllmPool | None, phases: PoolPhases, token: str, timeout_s: float
    ) -> None:
        self._topology = topology
        self._pool = pool
        self._phases = phases
        self._token = token
        self._timeout_s = timeout_s

    def give_to_pool(self) -> None:
        """Frees what the trainer's allocator keeps for later, before the pool wakes up."""
        if self._topology.device.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        self._topology.raise_together(None)  # a server's GPUs belong to several ranks

    def take_from_pool(self) -> None:
        """Puts the pool to sleep, once every replica has its rollouts.

        Raises:
            UserError: on every rank; a server keeps its memory.
        """
        self._topology.raise_together(None)
        failure = None
        if self._topology.is_lead:
            failure = self._put_to_sleep()
        self._topology.raise_together(failure)

    def _put_to_sleep(self) -> str | None:
        assert self._pool is not None
        members = self._pool.members
        # Those that are out as well: a server that failed a push holds memory.
        timeouts = dict.fromkeys(members.configured, self._timeout_s)
        try:
            failures = failures_of(timeouts, self._token, self._phases.make_room)
        except TooManyOpenFiles as failure:
            return str(failure)
        for address, failure in failures.items():
            members.take_out(address, failure)
        kept: list[UserError] = [one for one in failures.values() if not isinstance(one, UnreachableError)]
        return f"the pool keeps memory that the trainer needs: {kept[0]}" if kept else None
