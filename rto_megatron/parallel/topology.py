"""Who this rank is, and with whom it speaks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from rto_megatron.config.training import (
    FP8_MULTIPLE,
    ContextScheme,
    GridConfig,
    ParallelConfig,
    RoleGridConfig,
    StageLayers,
    shared_ranks,
)
from rto_megatron.errors import SUBJECTS, UserError
from rto_megatron.parallel import collectives, meeting
from rto_megatron.parallel.following import Following
from rto_megatron.parallel.groups import make_groups
from rto_megatron.parallel.seeds import seed_generators
from rto_megatron.parallel.whole_models import require_whole_models
from rto_megatron.parallel.work import Work
from rto_megatron.platform.device import Device


@dataclass(frozen=True, eq=False)
class Topology:
    """A TP x CP x PP x DP layout, and this rank's place in it; each is equal to itself alone.

    A copy of a model is on tensor x pipeline ranks. A replica is the context x as many that work on one micro-batch, of
    whose rows each context rank has a part; `data_rank` numbers the replicas. The job has the policy's layout; a role
    has it too, or one of its own, which `of` gives. Where a layout is not on all ranks the others follow a replica of
    it: they have its data rank, make its calls, and hear what it knows.

    Example:
        Topology.init(prepare(), ParallelConfig(tensor=2, pipeline=2, sequence=True), seed=42)
    """

    device: Device
    rank: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    sequence_parallel: bool
    context_rank: int = 0
    context_size: int = 1
    context_scheme: ContextScheme = "ulysses"
    # Of the layout, for Megatron's constructors and schedules; a group that was not made raises when it is asked for.
    groups: ProcessGroupCollection = field(default_factory=ProcessGroupCollection, repr=False)
    work: Work = field(default_factory=Work, repr=False)  # of all models of this rank
    following: Following = field(default_factory=lambda: Following(0, None, None), repr=False)
    # Role -> the layout that it has for itself.
    roles: "Mapping[str, Topology]" = field(default_factory=dict, repr=False)
    # Of a role with a layout of its own, the policy's: from where its data comes and where its numbers are wanted.
    home: "Topology | None" = field(default=None, repr=False)
    expert_size: int = 1  # parts of a mixture's experts
    expert_tensor_size: int = 1  # ranks of one
    virtual_size: int = 1  # chunks of a model on each stage
    stages: StageLayers = None  # layers of each stage

    @classmethod
    def init(
        cls,
        device: Device,
        parallel: ParallelConfig,
        seed: int,
        timeout: timedelta = timedelta(minutes=30),
    ) -> "Topology":
        """Joins the process group that the launcher announced in the environment.

        Args:
            parallel: the layout of the policy, and those that roles have for themselves.
            timeout: of a collective; longer than one rank may let the others wait, such as for rollouts.

        Raises:
            AbsentRanks: not all ranks came.
            RecipeError: the number of a layout's ranks holds no whole number of models.
        """
        if not dist.is_initialized():
            meeting.join_ranks(device.backend, timeout)
        others: dict[str, Topology] = {}
        shared = shared_ranks(parallel.roles, dist.get_world_size())
        grid = RoleGridConfig(**{name: value for name, value in parallel if name in GridConfig.model_fields})
        policy = _placed(device, grid, shared, "parallel", timeout, Work(), others, None)
        seed_generators(seed, policy.tensor_rank)
        made = {grid: policy}
        for role, own in parallel.roles.items():
            if own not in made:
                section, place = f"parallel.roles.{role}", own.own_ranks or shared
                made[own] = _placed(device, own, place, section, timeout, policy.work, {}, policy)
            others[role] = made[own]
        return policy

    def of(self, role: str) -> "Topology":
        """The layout of a role."""
        return self.roles.get(role, self)

    @property
    def is_layout_of_all(self) -> bool:
        """Whether no role has a layout of its own."""
        return all(place.home is None for place in self.roles.values())

    @property
    def holds_shard(self) -> bool:
        """Whether this rank is one of the layout's, and no follower."""
        return self.following.followed is None

    @property
    def replica_ranks(self) -> int:
        """Ranks that work on a micro-batch together."""
        return self.tensor_size * self.context_size * self.pipeline_size

    @property
    def world_size(self) -> int:
        """All ranks of the job."""
        return self.data_size * self.replica_ranks + self.following.num_followers

    @property
    def is_lead(self) -> bool:
        """True on the one rank that writes logs and talks to the user."""
        return self.rank == 0

    @property
    def is_replica_lead(self) -> bool:
        """True on one rank of every replica: the one that asks the pool for rollouts."""
        is_first = self.tensor_rank == 0 and self.context_rank == 0 and self.pipeline_rank == 0
        return self.holds_shard and is_first

    @property
    def is_first_stage(self) -> bool:
        """True where the embedding lives."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where logits and values come out."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def row_multiple(self) -> int:
        """Token rows are padded to a multiple of this: context and sequence parallelism cut them in equal parts, each
        of which is the rows of a product."""
        rows = FP8_MULTIPLE if self.device.has_fp8 else 1
        return rows * (self.tensor_size if self.sequence_parallel else 1) * self.context_size

    @property
    def spread(self) -> int:
        """Ranks of a stage that hold all its parameters, experts too: those of one replica, or of several."""
        return math.lcm(self.tensor_size, self.expert_size * self.expert_tensor_size)

    @property
    def stage_rank(self) -> int:
        """This rank's place among all of its stage, if it holds a shard: the first replica's ranks come first."""
        return int(self.groups.tp_dp_cp.rank())

    @property
    def is_exchanging(self) -> bool:
        """Whether a mixture's replicas send each other tokens: they make their passes together."""
        return self.expert_size * self.expert_tensor_size > self.tensor_size

    def data_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same shard in every replica."""
        group: dist.ProcessGroup = self.groups.dp
        return group

    def tensor_group(self) -> dist.ProcessGroup:
        """Ranks that hold the shards of one layer, and with it of the vocabulary."""
        group: dist.ProcessGroup = self.groups.tp
        return group

    def context_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same shard and the parts of one row."""
        group: dist.ProcessGroup = self.groups.cp
        return group

    def dp_sum(self, tensor: Tensor) -> Tensor:
        """Sum over replicas, leaving `tensor` as it is; every rank must call it."""
        if self.data_size == 1 and not self.following.num_followers:
            return tensor
        total = tensor.clone()
        if self.holds_shard:
            dist.all_reduce(total, group=self.groups.dp)
        return self.heard_tensor(total)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, leaving `tensor` as it is; every rank must call it."""
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def any(self, is_true: bool) -> bool:
        """True on every rank when it is on one; all ranks must call it."""
        return bool(self.all_sum(torch.tensor(float(is_true), device=self.device.torch_device)))

    def most(self, count: int) -> int:
        """The largest count of the replicas that exchange tokens; all their ranks must call it."""
        total = torch.tensor(count, device=self.device.torch_device)
        dist.all_reduce(total, dist.ReduceOp.MAX, group=self.groups.tp_ep)
        return int(total)

    def from_last_stage(self, tensors: list[Tensor] | None, lengths: list[int]) -> list[Tensor]:
        """Float32 vectors computed on the last pipeline stage, on every rank; every rank of a replica must call it, and
        those that follow it.

        Args:
            tensors: one [length] vector per entry of `lengths` on the last stage, None elsewhere.
            lengths: known on every rank.
        """
        if not lengths:
            return []
        if self.pipeline_size == 1 and not self.following.num_followers:
            assert tensors is not None
            return tensors
        flat = (
            torch.cat(tensors)
            if tensors is not None
            else torch.empty(sum(lengths), device=self.device.torch_device)
        )
        if self.holds_shard and self.pipeline_size > 1:
            dist.broadcast(flat, _last_of(self.groups.pp), group=self.groups.pp)
        return list(self.heard_tensor(flat).split(lengths))

    def replica_value[T](self, value: T, kind: type[T]) -> T:
        """A value of the replica's lead, on every rank of the replica and those that follow it; all must call it.

        Args:
            kind: the type of the value, by which the others read it.
        """
        if self.holds_shard and self.tensor_rank == 0 and self.pipeline_rank == 0:
            source, group = dist.get_global_rank(self.groups.cp, 0), self.groups.cp
            value = collectives.broadcast(value, kind, source, group, self.device.torch_device)
        if self.holds_shard:
            source = dist.get_global_rank(self.groups.mp, 0)
            value = collectives.broadcast(value, kind, source, self.groups.mp, self.device.torch_device)
        return self.heard(value, kind)

    def last_stage_value[T](self, value: T, kind: type[T]) -> T:
        """A value of the replica's last pipeline stage; see `replica_value`."""
        if self.holds_shard:
            source, group = _last_of(self.groups.pp), self.groups.pp
            value = collectives.broadcast(value, kind, source, group, self.device.torch_device)
        return self.heard(value, kind)

    def heard[T](self, value: T, kind: type[T]) -> T:
        """What all ranks of a replica have, on those that follow it too; all must call it. See `replica_value`."""
        audience = self.following.audience
        return value if audience is None else audience.value(value, kind, self.device.torch_device)

    def heard_tensor(self, tensor: Tensor) -> Tensor:
        """Does with numbers what `heard` does; who follows brings a tensor of that shape and dtype, to be filled."""
        return tensor if self.following.audience is None else self.following.audience.tensor(tensor)

    def lead_value[T](self, value: T, kind: type[T]) -> T:
        """A value of the lead rank, on every rank; all ranks must call it. See `replica_value`."""
        return collectives.broadcast(value, kind, 0, _world(), self.device.torch_device)

    def gather[T](self, value: T, kind: type[T]) -> list[T]:
        """Every replica's value, by data rank, on every rank; all ranks must call it. See `replica_value`."""
        if not self.holds_shard:
            return [self.heard(value, kind) for _ in range(self.data_size)]
        found = collectives.gather(value, kind, self.data_group(), self.device.torch_device)
        return [self.heard(one, kind) for one in found]

    def gather_tensors(self, own: Tensor) -> list[Tensor]:
        """Every replica's tensor of one shape and dtype, by data rank, on every rank; all ranks must call it."""
        parts = [torch.empty_like(own) for _ in range(self.data_size)]
        if self.holds_shard:
            dist.all_gather(parts, own, group=self.groups.dp)
        return list(self.heard_tensor(torch.stack(parts)).unbind())

    def gather_all[T](self, value: T, kind: type[T]) -> list[T]:
        """Every rank's value, by rank, on every rank; all ranks must call it. See `replica_value`."""
        return collectives.gather(value, kind, _world(), self.device.torch_device)

    def raise_together(self, error: UserError | None, *kinds: type[UserError]) -> None:
        """Raises on every rank when any rank passes an error: nobody waits for a rank that left. All must call it.

        Args:
            kinds: classes that the error keeps, special ones before general ones; equal on all ranks. An error of
                another class is raised as one of its subject.

        Raises:
            UserError: the error of the lowest rank that has one.

        Example:
            topology.raise_together(error, DiskFull, CheckpointError)
        """
        kinds = (*kinds, *SUBJECTS, UserError)
        own: list[tuple[int, str]] = []  # none, or one
        if error is not None:
            own = [(next(number for number, kind in enumerate(kinds) if isinstance(error, kind)), str(error))]
        for raised in self.gather_all(own, list[tuple[int, str]]):
            for number, text in raised:
                raise kinds[number](text)

    def gather_tensor_shards(self, shard: Tensor) -> list[Tensor]:
        """The shards of all tensor ranks, in order; every rank of the tensor group must call it."""
        return _all_of(shard, self.groups.tp)

    def gather_expert_shards(self, shard: Tensor) -> list[Tensor]:
        """The shards of an expert, in order; every rank that holds one of them must call it."""
        return _all_of(shard, self.groups.expt_tp)

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier()

    def await_all(self) -> None:
        """Call it before a collective for which one rank may let the others wait; all ranks must.

        A collective of NCCL's keeps its GPU busy while it waits, and a pool may be sampling on that. One of gloo's does
        not, and notices at once who is gone: nothing is done.
        """
        if self.device.is_cuda:
            meeting.await_all(self.world_size)


def _placed(
    device: Device,
    grid: GridConfig,
    ranks: Sequence[int],
    section: str,
    timeout: timedelta,
    work: Work,
    roles: Mapping[str, Topology],
    home: Topology | None,
) -> Topology:
    """This rank's place in a grid over some ranks; all ranks must call it, for all grids in one order."""
    world = dist.get_world_size()
    require_whole_models(grid, ranks, world, section)
    data_size = len(ranks) // grid.replica_ranks
    experts = (grid.expert, grid.expert_tensor)
    groups = make_groups(ranks, grid.tensor, grid.pipeline, timeout, *experts, grid.context)
    following = Following.of(ranks, world, data_size, grid.pipeline, timeout)
    followed = following.followed
    return Topology(
        device=device,
        rank=dist.get_rank(),
        tensor_rank=groups.tp.rank() if followed is None else 0,
        tensor_size=grid.tensor,
        pipeline_rank=groups.pp.rank() if followed is None else 0,
        pipeline_size=grid.pipeline,
        data_rank=groups.dp.rank() if followed is None else followed,
        data_size=data_size,
        sequence_parallel=grid.sequence and grid.tensor > 1,
        context_rank=groups.cp.rank() if followed is None else 0,
        context_size=grid.context,
        context_scheme=grid.context_scheme,
        groups=groups,
        work=work,
        following=following,
        roles=roles,
        home=home,
        expert_size=grid.expert,
        expert_tensor_size=grid.expert_cut,
        virtual_size=grid.virtual,
        stages=grid.stages,
    )


def _all_of(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


def _last_of(group: dist.ProcessGroup) -> int:
    return dist.get_global_rank(group, group.size() - 1)


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "Topology.init makes it"
    return group
