"""What follows from a recipe on a number of ranks, derived once: who reads it need not derive it again."""

import math
from dataclasses import dataclass
from itertools import chain

from rto_megatron.config.facts import Facts, facts_of
from rto_megatron.config.roles import Role, roles_of
from rto_megatron.config.schema import Stage
from rto_megatron.config.training import ParallelConfig, StageLayers


@dataclass(frozen=True)
class RankLayout:
    """How a model lies on the trainer's ranks.

    Example:
        RankLayout(tensor=2, pipeline=2, data=4).num_ranks == 16
    """

    tensor: int
    pipeline: int
    data: int  # replicas
    expert: int = 1  # parts of the experts of a mixture
    expert_tensor: int | None = None  # ranks of one; None: as many as tensor
    context: int = 1  # ranks that share the tokens of a row
    virtual: int = 1  # chunks of the model on each stage
    stages: StageLayers = None  # layers of each stage

    @property
    def replica_ranks(self) -> int:
        """Ranks that work on a micro-batch together."""
        return self.tensor * self.context * self.pipeline

    @property
    def copies(self) -> int:
        """Ranks that hold the same shard of the model, over which a distributed optimizer is sharded."""
        return self.data * self.context

    @property
    def num_ranks(self) -> int:
        """All ranks that hold the model."""
        return self.replica_ranks * self.data

    @property
    def expert_ranks(self) -> int:
        """Ranks of a stage over which a mixture's experts are cut and spread."""
        return self.expert * (self.expert_tensor or self.tensor)

    @property
    def expert_replicas(self) -> int:
        """How often each expert is held."""
        return self.tensor * self.copies // self.expert_ranks


def layout_on(parallel: ParallelConfig, world_size: int, role: str = "policy") -> RankLayout:
    """The layout of a role, where the job has so many ranks; rounded down to whole replicas."""
    grid, ranks = parallel.grid_of(role), parallel.ranks_of(role, world_size)
    data = len(ranks) // grid.replica_ranks
    experts, stages = (grid.expert, grid.expert_tensor), (grid.virtual, grid.stages)
    return RankLayout(grid.tensor, grid.pipeline, data, *experts, grid.context, *stages)


def fewest_ranks(parallel: ParallelConfig, times: int = 1) -> int:
    """The smallest number of ranks that holds every role.

    Args:
        times: of what lies on the policy's ranks, so many replicas, or so many times what holds all roles there.
    """
    own, step = _own_and_step(parallel)
    highest = max((grid.own_ranks.stop for grid in parallel.roles.values()), default=0)
    return own + step * max(times, -(-(highest - own) // step))


def most_ranks(parallel: ParallelConfig, available: int) -> int:
    """The largest number up to `available` that holds every role; the smallest of all where none is so small."""
    own, step = _own_and_step(parallel)
    return fewest_ranks(parallel, max(1, (available - own) // step))


def _own_and_step(parallel: ParallelConfig) -> tuple[int, int]:
    """How many ranks belong to single roles, and what the number of the others is a multiple of."""
    own = set(chain.from_iterable(grid.own_ranks for grid in parallel.roles.values()))
    shared = [grid.whole_ranks for grid in parallel.roles.values() if not grid.own_ranks]
    return len(own), math.lcm(parallel.whole_ranks, *shared)


@dataclass(frozen=True)
class BatchPlan:
    """Batch arithmetic of one stage; all counts are sequences, or pairs where the stage reads pairs.

    Example:
        BatchPlan(train_per_rank=8, num_microbatches=4, rollout_per_rank=32, updates_per_rollout=4)
    """

    # The mean, rounded down, where micro-batches go by tokens; 0 where the stage does not train.
    train_per_rank: int
    # Of an optimizer step; None: as its lengths make it; 0 where the stage does not train.
    num_microbatches: int | None
    rollout_per_rank: int  # 0 where the stage does not sample
    # Optimizer steps of one pass over the rollouts; 0 where the stage does not sample.
    updates_per_rollout: int


@dataclass(frozen=True)
class StagePlan:
    """A stage on its ranks; valid only where `checks.find_problems` finds nothing.

    Example:
        plan_stage(load_recipe("rto.yaml"), world_size=8).layout_of("policy").data
    """

    config: Stage
    facts: Facts
    world_size: int  # all ranks
    layout: RankLayout  # of the policy, and of every role that names none
    roles: tuple[Role, ...]
    batches: BatchPlan

    def layout_of(self, role: str) -> RankLayout:
        """Of one model."""
        assert role in {one.name for one in self.roles}, role
        return layout_on(self.config.parallel, self.world_size, role)

    @property
    def rank_sets(self) -> dict[tuple[int, ...], tuple[str, ...]]:
        """Ranks that hold the same models -> those models; the policy's first."""
        found: dict[tuple[int, ...], tuple[str, ...]] = {}
        for role in self.roles:
            ranks = tuple(self.config.parallel.ranks_of(role.name, self.world_size))
            found[ranks] = (*found.get(ranks, ()), role.name)
        return found


def plan_stage(config: Stage, world_size: int) -> StagePlan:
    """Derives the plan of a stage on `world_size` ranks."""
    facts, layout = facts_of(config), layout_on(config.parallel, world_size)
    return StagePlan(
        config=config,
        facts=facts,
        world_size=world_size,
        layout=layout,
        roles=roles_of(config),
        batches=_batches(facts, layout.data),
    )


def _batches(facts: Facts, replicas: int) -> BatchPlan:
    if facts.training is None:
        return BatchPlan(0, 0, 0, 0)
    batch = facts.training.batch
    rollout = 0 if facts.online is None else facts.online.responses_per_step
    return BatchPlan(
        train_per_rank=batch.train // replicas,
        num_microbatches=None if batch.micro is None else batch.train // replicas // batch.micro,
        rollout_per_rank=rollout // replicas,
        updates_per_rollout=rollout // batch.train,
    )
