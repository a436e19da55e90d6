"""Which ranks hold a parameter, or a shard of it, and which of them answers for it where one has to.

The ranks of a pipeline stage are cut into runs of `Topology.spread`, each of which holds all its parameters: a layer's
shards lie on the tensor ranks of every replica, an expert's on the ranks of its part. Who answers is of the first run
and, in it, the first that holds the shard. Without experts in parallel a run is a replica.
"""

from collections.abc import Sequence

from torch import Tensor

from rto_megatron.models.chunks import cut_of
from rto_megatron.models.parameters import stage_of
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import MappedParameter
from rto_megatron.parallel.topology import Topology


def num_places(topology: Topology) -> int:
    """Ranks that hold the whole model, the experts' once."""
    return topology.pipeline_size * topology.spread


def place_of(topology: Topology) -> int:
    """This rank's number among those that hold the model with it, of which it is one: stage after stage."""
    return topology.pipeline_rank * topology.spread + topology.stage_rank % topology.spread


def run_of(topology: Topology) -> int:
    """Which of the runs that hold the model this rank is of."""
    return topology.stage_rank // topology.spread


def holders(
    parameter: MappedParameter, shape: ModelShape, has_scalar_head: bool, topology: Topology
) -> Sequence[int]:
    """Places of the ranks that answer for the shards of a parameter, in the order of the shards.

    One for a parameter that is not cut.
    """
    first = stage_of(parameter, cut_of(shape, has_scalar_head, topology)) * topology.spread
    num_shards = topology.tensor_size
    if parameter.expert is not None:
        assert shape.experts is not None
        num_shards = topology.expert_tensor_size
        first += parameter.expert // (shape.experts.num // topology.expert_size) * num_shards
    return range(first, first + (1 if parameter.layout.dim is None else num_shards))


def shard_of(parameter: MappedParameter, topology: Topology) -> tuple[int, int]:
    """(rank, size) of this rank among those that a parameter is cut over."""
    if parameter.expert is None:
        return topology.tensor_rank, topology.tensor_size
    return topology.groups.expt_tp.rank(), topology.expert_tensor_size


def gathered(parameter: MappedParameter, shard: Tensor, topology: Topology) -> list[Tensor]:
    """All shards of a parameter; every rank of the first run that answers for one of them must call it."""
    if parameter.layout.dim is None:
        return [shard]
    if parameter.expert is None:
        return topology.gather_tensor_shards(shard)
    return topology.gather_expert_shards(shard)
