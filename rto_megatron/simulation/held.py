"""What models take of a rank: bytes of weights, gradients and optimizers, each storage once."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from rto_megatron.engine.megatron import Model, TrainedModel
from rto_megatron.engine.optimizer import state_tensors
from rto_megatron.simulation.outcome import HeldRole


def held_role(name: str, model: Model) -> HeldRole:
    """The parts of a role that lie on this rank."""
    seen: set[int] = set()
    parts = {name: _new_bytes([*model.module.parameters(), *model.module.buffers()], seen)}
    if isinstance(model, TrainedModel):
        parts["gradients"] = _new_bytes(model.gradient_buffers(), seen)
        parts["optimizer"] = _new_bytes(state_tensors(model.optimizer), seen)
    num_parameters = sum(parameter.numel() for parameter in model.module.parameters())
    return HeldRole(name, model.topology.pipeline_rank, num_parameters, parts)


def held_roles(models: Mapping[str, Model]) -> tuple[HeldRole, ...]:
    """Of all models of a rank."""
    return tuple(held_role(name, model) for name, model in models.items())


def _new_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Of storages that are not seen yet."""
    size = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            size += storage.nbytes()
    return size
