"""The trained policy as a source of Hugging Face tensors for the pool, straight from its shards."""

from collections.abc import Iterator

from torch import Tensor

from rto_megatron.engine.absent import AbsentModel, RoleModel
from rto_megatron.engine.weights import stage_pieces
from rto_megatron.models.parameters import stage_of, stored_parameters
from rto_megatron.models.weight_map import cut, dtype_name
from rto_megatron.weight_sync.manifest import PieceSpec


class PolicySource:
    """Plays the family's weight map backward; see `weight_sync.manifest.PieceSource`.

    Sender p x (tensor ranks) + t is tensor rank t of pipeline stage p; it sends what it holds, nothing is gathered.

    Example:
        PolicySource(policy).specs()
    """

    def __init__(self, policy: RoleModel) -> None:
        self.policy = policy

    @property
    def sender(self) -> int:
        """This rank's index among the senders of its replica."""
        topology = self.policy.topology
        return topology.pipeline_rank * topology.tensor_size + topology.tensor_rank

    def specs(self) -> tuple[PieceSpec, ...]:
        """The piece of every tensor on each rank of a replica; equal on all ranks."""
        shape, topology = self.policy.shape, self.policy.topology
        dtype = self.policy.dtype
        specs = []
        for parameter in stored_parameters(shape, self.policy.has_scalar_head):
            first_sender = stage_of(parameter, shape, topology.pipeline_size) * topology.tensor_size
            dim = parameter.layout.dim
            owners = range(1 if dim is None else topology.tensor_size)
            for rank in owners:
                for name, size in parameter.sizes():
                    start, length = cut(size[dim or 0], rank, len(owners))
                    if length:
                        named = dtype_name(parameter.dtype(dtype))
                        specs.append(
                            PieceSpec(name, named, size, first_sender + rank, dim or 0, start, length)
                        )
        return tuple(specs)

    def pieces(self, sender: int) -> Iterator[tuple[str, Tensor]]:
        """This rank's pieces in the order of `specs`."""
        model = self.policy
        assert sender == self.sender and not isinstance(model, AbsentModel)
        return stage_pieces(model.module, model.shape, model.has_scalar_head, model.topology)
