"""What a simulated rank did: operations, bytes over groups, numbers that were asked of the device."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rto_megatron.simulation.operations import flops_of

_PACKAGES = ("/rto_megatron/", "/megatron/core/")
_OWN = str(Path(__file__).parent)


@dataclass(frozen=True)
class Traffic:
    """Calls of one collective over one kind of group.

    Example:
        Traffic("all_reduce", "tensor", num_calls=64, num_bytes=2**30)
    """

    collective: str
    group: str
    num_calls: int
    num_bytes: int  # of the larger side of each call: what is gathered, or scattered


@dataclass(frozen=True)
class DeviceRead:
    """A place that waits for the device to tell a number.

    Example:
        DeviceRead("rto_megatron/engine/megatron.py:310", num_reads=2)
    """

    place: str
    num_reads: int


class RankTally:
    """Counts until it is taken.

    Args:
        groups: name of a process group -> what it is called for people; groups of one rank are left out.

    Example:
        tally.count(func, args, kwargs, out)
        tally.traffic()
    """

    def __init__(self, groups: Mapping[str, str]) -> None:
        self._groups = dict(groups)
        self.restart()

    def restart(self) -> None:
        """Starts counting anew."""
        self.flops = 0.0
        self._calls: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._reads: Counter[str] = Counter()

    def count(
        self, func: torch._ops.OpOverload, args: Sequence[object], kwargs: Mapping[str, object], out: object
    ) -> None:
        """One call of torch with fake tensors."""
        if func.namespace == "c10d":
            self._count_traffic(func, args)
        else:
            self.flops += flops_of(func.overloadpacket, args, kwargs, out)

    def read(self) -> None:
        """A number of the device is asked for, at the place of the caller that is ours or Megatron's."""
        frame = sys._getframe(1)
        while frame.f_back is not None:
            name = frame.f_code.co_filename
            if not name.startswith(_OWN) and any(package in name for package in _PACKAGES):
                break
            frame = frame.f_back
        name = frame.f_code.co_filename
        start = max(name.rfind(package) for package in _PACKAGES)
        self._reads[f"{name[start + 1 :]}:{frame.f_lineno}"] += 1

    def traffic(self) -> tuple[Traffic, ...]:
        """What went over groups, by bytes."""
        return tuple(
            Traffic(*key, self._calls[key], num_bytes) for key, num_bytes in self._bytes.most_common()
        )

    def reads(self) -> tuple[DeviceRead, ...]:
        """Where numbers were asked for, by how often."""
        return tuple(DeviceRead(place, number) for place, number in self._reads.most_common())

    def _count_traffic(self, func: torch._ops.OpOverload, args: Sequence[object]) -> None:
        group = next((found for one in args if (found := _group_of(one)) is not None), None)
        if group is None or group.size() == 1:
            return
        key = func.overloadpacket.__name__.strip("_"), self._groups.get(group.group_name, "other ranks")
        self._calls[key] += 1
        self._bytes[key] += max(sum(map(_num_bytes, tree_leaves(one))) for one in args)


def _num_bytes(leaf: object) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0


def _group_of(argument: object) -> dist.ProcessGroup | None:
    if not isinstance(argument, torch.ScriptObject):
        return None
    if not str(argument._type()).endswith("ProcessGroup"):
        return None
    return dist.ProcessGroup.unbox(argument)
