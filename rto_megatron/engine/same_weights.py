"""Whether two models that were loaded are one: the same layout, shape and numbers."""

import torch
from torch import Tensor

from rto_megatron.engine.absent import AbsentModel, FrozenRole
from rto_megatron.engine.megatron import FrozenModel


def are_same(one: FrozenRole, other: FrozenRole) -> bool:
    """Whether either may stand for the other, to the bit; all ranks must call it for the same models.

    Weights are compared as they lie on the ranks, wherever they were loaded from. What lies in another layout is
    another model.
    """
    if one.topology is not other.topology or _kind(one) != _kind(other):
        return False
    differs = not (isinstance(one, AbsentModel) or isinstance(other, AbsentModel) or _equal(one, other))
    return not one.topology.any(differs)


def _kind(model: FrozenRole) -> tuple[object, ...]:
    """What all ranks know of a model."""
    return model.shape, model.has_scalar_head, model.scale, model.dtype


def _equal(one: FrozenModel, other: FrozenModel) -> bool:
    own, others = _tensors(one), _tensors(other)
    return own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own)


def _tensors(model: FrozenModel) -> dict[str, Tensor]:
    return {**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}
