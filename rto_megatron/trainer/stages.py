"""Runs a stage on this rank. The one place that prepares the device before anything of Megatron is imported."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rto_megatron.config import schema
from rto_megatron.config.facts import facts_of
from rto_megatron.config.reward_checks import longest_wait_s
from rto_megatron.config.training import ParallelConfig
from rto_megatron.errors import MachineError, UserError
from rto_megatron.lifecycle.start_up import begin_part, begin_rank
from rto_megatron.platform.collector import resting
from rto_megatron.platform.device import Device, prepare

if TYPE_CHECKING:
    from rto_megatron.parallel.topology import Topology

_SHORTEST_TIMEOUT = timedelta(minutes=30)


def run_stage(config: schema.Stage) -> None:
    """Trains or evaluates what the configuration says, as one of the ranks that the launcher started.

    Raises:
        UserError: on every rank, for anything that a user can mend.
    """
    _refuse_lone_task()
    begin_rank()
    with resting():
        device = prepare(config.precision)
    with ranks(device, config.parallel, config.run.seed, _collective_timeout(config)) as topology:
        facts = facts_of(config)
        if facts.evaluation is not None:
            with resting():
                from rto_megatron.trainer.evaluate import evaluate

            evaluate(facts.evaluation, topology)
        elif facts.online is not None:
            with resting():
                from rto_megatron.trainer.online import train_online

            train_online(facts.online, topology)
        elif facts.offline is not None:
            with resting():
                from rto_megatron.trainer.offline import train_offline

            train_offline(facts.offline, topology)


def _refuse_lone_task() -> None:
    """One of several tasks that are no ranks would believe to be the only one, and write the same folder."""
    if "RANK" in os.environ:
        return
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks != "1":
        raise MachineError(
            f"SLURM started {tasks} tasks without RANK and WORLD_SIZE; start one task per machine "
            "(srun --ntasks-per-node=1) that runs torchrun, and torchrun starts the ranks"
        )
    nodes = os.environ.get("PET_NNODES", "1")
    if nodes not in ("1", "1:1"):
        raise MachineError(
            f"PET_NNODES={nodes} says that this is one of several machines of a job, as Kubeflow does, and there is no "
            "RANK; run on each of them: torchrun -m rto_megatron.cli.main train RECIPE"
        )


def _collective_timeout(config: schema.Stage) -> timedelta:
    """Replica leads let others wait for rollouts and rewards: if not set, twice what those may take or half an hour."""
    if config.run.collective_timeout_s is not None:
        return timedelta(seconds=config.run.collective_timeout_s)
    if (pool := facts_of(config).pool) is None:
        return _SHORTEST_TIMEOUT
    waits = [pool.request_timeout_s]
    if (sampling := facts_of(config).sampling) is not None:
        waits.append(longest_wait_s(sampling))
    return max(_SHORTEST_TIMEOUT, timedelta(seconds=2 * max(waits)))


@contextmanager
def ranks(
    device: Device, parallel: ParallelConfig, seed: int, timeout: timedelta = _SHORTEST_TIMEOUT
) -> Iterator["Topology"]:
    """The process group of the launcher's ranks, or of this process alone.

    It is left in order at the end and after an error that every rank raises. After a bug the process just ends:
    leaving would wait for the ranks that do not know of it.
    """
    with resting():
        import torch.distributed as dist

        from rto_megatron.parallel.topology import Topology

    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in alone.items():
        os.environ.setdefault(key, value)
    begin_part("groups")
    try:
        topology = Topology.init(device, parallel, seed, timeout)
        begin_part("imports")
        yield topology
    except UserError:
        if dist.is_initialized():
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
