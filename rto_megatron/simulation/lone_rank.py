"""One rank of a job whose other ranks are not there: each of them is taken to say what this one says.

Tensors of other ranks come from torch's fake process group, which answers every call at once. What ranks tell each
other in words (metrics, sizes, errors), and the shapes that pipeline stages announce, is answered here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map

from rto_megatron.config.schema import Stage
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.cpu import CPU
from rto_megatron.platform.device import prepare
from rto_megatron.platform.patches import replace as put_in_place

# Attribute of a layout's collection -> what the group is called; the first name of a group counts.
_GROUPS = {
    "tp": "tensor",
    "cp": "context",
    "pp": "pipeline",
    "ep": "expert",
    "dp": "data",
    "dp_cp": "data x context",
    "tp_cp": "tensor x context",
    "tp_ep": "expert tensor x expert",
    "expt_dp": "replicas of experts",
    "embd": "first and last stage",
    "mp": "tensor x pipeline",
}


@dataclass(frozen=True, eq=False)
class LoneTopology(Topology):
    """A place in a layout whose other ranks agree with this one.

    Example:
        lone(topology).last_stage_value({"loss": (1.0, 1.0)}, dict)
    """

    def replica_value[T](self, value: T, kind: type[T]) -> T:
        """See `Topology.replica_value`."""
        return value

    def last_stage_value[T](self, value: T, kind: type[T]) -> T:
        """See `Topology.last_stage_value`."""
        return value

    def heard[T](self, value: T, kind: type[T]) -> T:
        """See `Topology.heard`."""
        return value

    def heard_tensor(self, tensor: Tensor) -> Tensor:
        """See `Topology.heard_tensor`."""
        return tensor

    def lead_value[T](self, value: T, kind: type[T]) -> T:
        """See `Topology.lead_value`."""
        return value

    def gather[T](self, value: T, kind: type[T]) -> list[T]:
        """See `Topology.gather`."""
        return [value] * self.data_size

    def gather_all[T](self, value: T, kind: type[T]) -> list[T]:
        """See `Topology.gather_all`."""
        return [value] * self.world_size


def lone(topology: Topology) -> LoneTopology:
    """The same place, with the layouts of all roles."""
    roles: dict[str, Topology] = {}
    policy = _alone(topology, roles=roles)
    made = {id(topology): policy}
    for role, place in topology.roles.items():
        if id(place) not in made:
            made[id(place)] = _alone(place, home=policy)
        roles[role] = made[id(place)]
    return policy


def _alone(topology: Topology, **changes: object) -> LoneTopology:
    values = {one.name: vars(topology)[one.name] for one in fields(topology)}
    return LoneTopology(**{**values, **changes})


@contextmanager
def joined(config: Stage, rank: int, world_size: int) -> Iterator[LoneTopology]:
    """A rank's place in a job that has no other."""
    device = prepare()
    _stay_in_place()
    _ask_for_numbers()
    _list_at_once()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield lone(Topology.init(device, config.parallel, config.run.seed))
    finally:
        dist.destroy_process_group()


def _stay_in_place() -> None:
    """A module that is asked to go where it is stays as it is: torch would swap fake parameters, and cannot."""
    move: Callable[..., torch.nn.Module] = torch.nn.Module.to

    def to(module: torch.nn.Module, *where: object, **how: object) -> torch.nn.Module:
        return module if where == (CPU,) and not how else move(module, *where, **how)

    put_in_place(torch.nn.Module, "to", to)


def _ask_for_numbers() -> None:
    """A tensor that is made of numbers of the device asks for each of them, as torch does below its dispatcher."""
    make: Callable[..., Tensor] = torch.tensor

    def asked(leaf: object) -> object:
        return leaf.item() if isinstance(leaf, FakeTensor) else leaf

    def tensor(data: object, **how: object) -> Tensor:
        return make(tree_map(asked, data), **how)

    put_in_place(torch, "tensor", tensor)


def _list_at_once() -> None:
    """A list of a tensor's numbers is one transfer from the device, where a fake tensor asks for each of them."""

    def tolist(tensor: FakeTensor) -> object:
        told = tensor.flatten()[0].item() if tensor.numel() else 0  # of one dtype all are told alike
        return numpy.full(tensor.shape, told).tolist()

    put_in_place(FakeTensor, "tolist", tolist)


def names_of_groups(topology: Topology) -> dict[str, str]:
    """Name of a process group of any layout -> what it is called for people."""
    found: dict[str, str] = {}
    for place in (topology, *topology.roles.values()):
        own = vars(place.groups)
        for attribute, name in _GROUPS.items():
            group = own.get(attribute)
            if group is not None:
                found.setdefault(group.group_name, name)
    return found


def announce_shapes(num_tokens: int, num_rows: int) -> None:
    """Makes every pipeline stage hear that its neighbour sends micro-batches of one shape.

    Args:
        num_tokens: of a row, before it is padded to what a layout cuts it by.
        num_rows: of a micro-batch.
    """

    def announced(
        stage: P2PCommunicator,
        to_next: Tensor | None,
        to_previous: Tensor | None,
        from_previous: bool,
        from_next: bool,
    ) -> tuple[list[int], list[int]]:
        config = stage.config
        cut = config.context_parallel_size
        if config.sequence_parallel:
            cut *= config.tensor_model_parallel_size
        shape = [-(-num_tokens // cut), num_rows, config.hidden_size]
        nothing = [0, 0, 0]
        return shape if from_previous else nothing, shape if from_next else nothing

    put_in_place(P2PCommunicator, "_communicate_shapes", announced)
