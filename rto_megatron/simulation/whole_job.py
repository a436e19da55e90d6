"""A job rank by rank: one of each kind is simulated, each in a process of its own."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import batched

import torch

from rto_megatron.config.plan import StagePlan
from rto_megatron.config.schema import Stage
from rto_megatron.errors import RecipeError
from rto_megatron.models.shape import ModelShape
from rto_megatron.simulation.lone_rank import joined
from rto_megatron.simulation.outcome import SimulatedRank
from rto_megatron.simulation.rank_steps import SimulatedStep
from rto_megatron.simulation.stage_steps import simulate_step

_MIDDLE = 1  # stands for all stages that are neither first nor last: it keeps the most micro-batches of them
_BUGS = (
    RuntimeError,
    TypeError,
    AssertionError,
    ValueError,
    LookupError,
    AttributeError,
    NotImplementedError,
)


class SimulationFailed(RecipeError):  # noqa: N818  (what became of the simulated job)
    """The job would fail, in the phase and at the place that the message names."""


def kinds_of_ranks(config: Stage, roles: Sequence[str], world_size: int) -> list[int]:
    """The first rank of each kind: ranks are alike where every role has the same place in its pipeline there."""
    found: dict[tuple[int | None, ...], int] = {}
    for rank in range(world_size):
        found.setdefault(tuple(_stage_of(config, role, rank, world_size) for role in roles), rank)
    return list(found.values())


def _stage_of(config: Stage, role: str, rank: int, world_size: int) -> int | None:
    """Pipeline stage of a role on a rank, middle ones as one; None where the rank holds nothing of it."""
    parallel = config.parallel
    ranks, grid = parallel.ranks_of(role, world_size), parallel.grid_of(role)
    pipeline = grid.pipeline
    if rank not in ranks:
        return None
    stage = ranks.index(rank) // (len(ranks) // pipeline)
    is_own_kind = stage in (0, pipeline - 1) or grid.stages is not None
    return stage if is_own_kind else _MIDDLE


def simulate_job(
    plan: StagePlan, shapes: Mapping[str, ModelShape], most_microbatches: int | None = None
) -> list[SimulatedRank]:
    """One step of each kind of rank.

    Args:
        shapes: role -> shape, of every model that the stage loads.
        most_microbatches: of an optimizer step, at most so many are simulated; None: one more than the longest pipeline
            has stages, interleaved ones twice as many as stages, from where on memory does not grow.

    Raises:
        SimulationFailed: the real job would fail too.
    """
    names = [role.name for role in plan.roles]
    grids = [plan.config.parallel.grid_of(name) for name in names]
    # An interleaved pipeline takes micro-batches by as many as it has stages.
    most = max(2 * grid.pipeline if grid.virtual > 1 else grid.pipeline + 1 for grid in grids)
    ranks = kinds_of_ranks(plan.config, names, plan.world_size)
    one = partial(_simulated, plan, shapes, most_microbatches or most)
    found = [answer for some in batched(ranks, len(os.sched_getaffinity(0))) for answer in _apart(one, some)]
    failures = [failure for failure in found if isinstance(failure, str)]
    if failures:
        raise SimulationFailed(failures[0])
    return [rank for rank in found if isinstance(rank, SimulatedRank)]


def _apart(one: Callable[[int], SimulatedRank | str], ranks: Sequence[int]) -> Iterator[SimulatedRank | str]:
    """What a function says of ranks, each asked in a process of its own.

    Process groups and Megatron's buffers are a process's own: each rank gets fresh ones.
    """
    forks = multiprocessing.get_context("fork")
    started = []
    for rank in ranks:
        receiver, sender = forks.Pipe(duplex=False)
        process = forks.Process(target=lambda rank, sender: sender.send(one(rank)), args=(rank, sender))
        process.start()
        sender.close()
        started.append((rank, process, receiver))
    for rank, process, receiver in started:
        try:
            yield receiver.recv()
        except EOFError:
            yield f"rank {rank}: the process that simulates it ended with status {process.exitcode}"
        process.join()


def _simulated(
    plan: StagePlan, shapes: Mapping[str, ModelShape], most_microbatches: int, rank: int
) -> SimulatedRank | str:
    """What a rank found, or why it failed."""
    torch.set_num_threads(1)
    with joined(plan.config, rank, plan.world_size) as topology:
        step = SimulatedStep(plan, shapes, topology, most_microbatches)
        try:
            simulate_step(step)
        except _BUGS as error:
            return f"rank {rank} of {plan.world_size} would fail {step.where}: {_told(error)}"
        return step.found(rank)


def _told(error: BaseException) -> str:
    """What was raised, and the last place of ours or Megatron's in which."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if "/simulation/" not in one.filename and "megatron" in one.filename]
    place = f" ({ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}, {ours[-1].name})" if ours else ""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}{place}"
