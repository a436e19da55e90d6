"""What the policy's replicas hold, shared out over those of a role with a layout of its own; and the way back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rto_megatron.parallel.topology import Topology
from rto_megatron.types import Metrics


@dataclass(frozen=True)
class Share[T]:
    """The part of one replica of a role; where the role has the policy's layout, what the policy's replica holds.

    Example:
        share = shared_out(texts, list[str], reward.topology)
        scores_B = share.back(scores_of(share.items))
    """

    items: list[T]  # none only where no replica of the policy has any
    topology: Topology  # of the role
    counts: list[int]  # items of each replica of the policy

    def back(self, rows: Tensor) -> Tensor:
        """What a role said of its items, as rows of the items that this rank's replica of the policy holds.

        All ranks must call it.

        Args:
            rows: [items, ...], equal on the ranks of a replica of the role; widths may differ between its replicas.

        Returns:
            [own items, ...], as wide as the widest, zeros behind a row's end.
        """
        home, total = self.topology.home, sum(self.counts)
        if home is None:
            return rows
        height = -(-total // self.topology.data_size)
        # Item i went to replica i % n, as its row i // n.
        whole = torch.stack(_of_replicas(rows, height, self.topology), dim=1).flatten(0, 1)
        first = sum(self.counts[: home.data_rank])
        return whole[first : first + self.counts[home.data_rank]]


def shared_out[T](own: list[T], kind: type[list[T]], topology: Topology) -> Share[T]:
    """Items of all replicas of the policy, dealt in turn to those of a role; all ranks must call it.

    Where there are fewer items than replicas, some replicas get the first one too, and nobody asks what they say of it.

    Args:
        own: of this rank's replica of the policy.
        kind: their type, by which other ranks read them.
        topology: of the role.
    """
    if topology.home is None:
        return Share(own, topology, [len(own)])
    parts = topology.home.gather(own, kind)
    everything = [item for part in parts for item in part]
    items = everything[topology.data_rank :: topology.data_size] or everything[:1]
    return Share(items, topology, [len(part) for part in parts])


def at_home(metrics: Metrics, topology: Topology) -> Metrics:
    """Sums of a role's replica, as those of the policy's are added up and divided by counts; all ranks must call it.

    Returns:
        With a layout of the role's own the sums of all its replicas, else the sums themselves.
    """
    if topology.home is None:
        return metrics
    parts = topology.gather(dict(metrics), dict[str, tuple[float, float]])
    return {
        name: (sum(p[name][0] for p in parts if name in p), sum(p[name][1] for p in parts if name in p))
        for name in dict.fromkeys(name for part in parts for name in part)
    }


def of_all_replicas(rows: Tensor, topology: Topology) -> Tensor:
    """[rows, ...] of every replica, by data rank, one below the other; all ranks must call it.

    Args:
        rows: as many on every replica; widths may differ, zeros follow a row's end.
    """
    return torch.cat(_of_replicas(rows, len(rows), topology))


def _of_replicas(rows: Tensor, height: int, topology: Topology) -> list[Tensor]:
    width = () if rows.ndim == 1 else (max(topology.gather(rows.shape[1], int)),)
    own = rows.new_zeros(height, *width)
    own[tuple(slice(size) for size in rows.shape)] = rows
    return topology.gather_tensors(own)
