"""Ranks without a shard of a layout: each follows one of its replicas, and is told what that replica's ranks know."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from rto_megatron.parallel import collectives


@dataclass(frozen=True)
class Audience:
    """The ranks that follow one replica, and the rank of it that tells them; all of them must call the methods.

    The teller is on the last pipeline stage, where outputs are, and is the first of the tensor ranks there.

    Example:
        followed = audience.value(mean, float, device)
    """

    teller: int  # global rank
    group: dist.ProcessGroup

    def value[T](self, value: T, kind: type[T], device: torch.device) -> T:
        """The teller's value, on every rank of the audience; see `collectives.broadcast`."""
        return collectives.broadcast(value, kind, self.teller, self.group, device)

    def tensor(self, tensor: Tensor) -> Tensor:
        """The teller's numbers; the others bring a tensor of its shape and dtype, which is filled."""
        dist.broadcast(tensor, self.teller, group=self.group)
        return tensor


@dataclass(frozen=True)
class Following:
    """What this rank has to do with the ranks that follow a layout's replicas.

    Example:
        Following.of(ranks, 4, num_replicas=2, pipeline=1, timeout=timedelta(minutes=30)).num_followers
    """

    num_followers: int
    followed: int | None  # the replica that this rank follows; None where it is of one itself
    audience: Audience | None  # None where this rank neither follows nor tells

    @classmethod
    def of(
        cls, ranks: Sequence[int], world_size: int, num_replicas: int, pipeline: int, timeout: timedelta
    ) -> "Following":
        """Follower i follows replica i modulo their number; every rank of the job must call it.

        Args:
            ranks: of the layout, ascending, numbered as `groups.make_groups` does.
        """
        others = [rank for rank in range(world_size) if rank not in ranks]
        last_stage = ranks[-len(ranks) // pipeline :]
        per_replica = len(last_stage) // num_replicas
        own, rank = None, dist.get_rank()
        for replica in range(num_replicas):
            teller, followers = last_stage[replica * per_replica], others[replica::num_replicas]
            if followers:
                group = dist.new_group([teller, *followers], timeout=timeout)
                if rank == teller or rank in followers:
                    own = Audience(teller, group)
        followed = others.index(rank) % num_replicas if rank in others else None
        return cls(len(others), followed, own)
