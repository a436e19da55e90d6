"""The trained policy as a source of Hugging Face tensors for the pool, straight from its shards."""

from collections.abc import Iterator

from torch import Tensor

from rto_megatron.engine.absent import AbsentModel, RoleModel
from rto_megatron.engine.holders import holders, place_of
from rto_megatron.engine.weights import stage_pieces
from rto_megatron.models.parameters import stored_parameters
from rto_megatron.models.weight_map import dtype_name
from rto_megatron.weight_sync.manifest import PieceSpec


class PolicySource:
    """Plays the family's weight map backward; see `weight_sync.manifest.PieceSource`.

    Senders are the ranks that hold the model with all its experts once (`engine.holders`): each sends what it answers
    for, nothing is gathered.

    Example:
        PolicySource(policy).specs()
    """

    def __init__(self, policy: RoleModel) -> None:
        self.policy = policy

    @property
    def sender(self) -> int:
        """This rank's index among the senders of its run."""
        return place_of(self.policy.topology)

    def specs(self) -> tuple[PieceSpec, ...]:
        """The piece of every tensor on each sender; equal on all ranks."""
        shape, topology = self.policy.shape, self.policy.topology
        dtype, has_head = self.policy.dtype, self.policy.has_scalar_head
        specs = []
        for parameter in stored_parameters(shape, has_head):
            dim, senders = parameter.layout.dim or 0, holders(parameter, shape, has_head, topology)
            for rank, sender in enumerate(senders):
                for run in parameter.runs(rank, len(senders)):
                    if run.length:
                        name, size = parameter.hf[run.tensor], parameter.hf_shapes[run.tensor]
                        named = dtype_name(parameter.dtype(dtype))
                        specs.append(PieceSpec(name, named, size, sender, dim, run.start, run.length))
        return tuple(specs)

    def pieces(self, sender: int) -> Iterator[tuple[str, Tensor]]:
        """This rank's pieces in the order of `specs`."""
        model = self.policy
        assert sender == self.sender and not isinstance(model, AbsentModel)
        return stage_pieces(model.module, model.shape, model.has_scalar_head, model.topology)
