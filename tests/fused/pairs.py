"""One model twice, in bf16: with TransformerEngine's layers and with torch's, from the same folder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from engine.layouts import frozen, topology, trained
from torch import Tensor

from rto_megatron.config.training import OptimizerConfig
from rto_megatron.engine.megatron import FrozenModel, Model, TrainedModel
from rto_megatron.engine.weights import local_parameters
from rto_megatron.models.layout_checks import own_layer_parts
from rto_megatron.parallel.topology import Topology

ADAM = OptimizerConfig(lr=1e-2)


def places(layout: str) -> tuple[Topology, Topology]:
    """This rank's place, computing with TransformerEngine and with torch."""
    place = topology(layout)
    assert place.device.kernels == "transformer_engine"
    return place, replace(place, device=replace(place.device, kernels="torch"))


def frozen_pair(layout: str, folder: Path, is_scalar: bool = False) -> tuple[FrozenModel, FrozenModel]:
    """Both without gradients."""
    fused, plain = (frozen(place, folder, is_scalar, "bf16") for place in places(layout))
    assert is_fused(fused) == (not own_layer_parts(fused.shape)) and not is_fused(plain)
    return fused, plain


def trained_pair(
    layout: str, folder: Path, is_scalar: bool = False, is_sharded: bool = False
) -> tuple[TrainedModel, TrainedModel]:
    """Both with an optimizer."""
    fused, plain = (
        trained(place, folder, is_scalar, ADAM, "bf16", is_distributed_optimizer=is_sharded)
        for place in places(layout)
    )
    assert is_fused(fused) and not is_fused(plain)
    return fused, plain


def is_fused(model: Model) -> bool:
    """Whether its layers are TransformerEngine's."""
    kinds = {type(module).__module__.split(".")[0] for module in model.module.modules()}
    return "transformer_engine" in kinds or any(
        "TELinear" in type(m).__name__ for m in model.module.modules()
    )


def numbers(model: Model, read: Callable[[torch.nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """Of each parameter what `read` gives, in float32, by its name in the whole model."""
    local = local_parameters(model.module)
    return {name: read(one).detach().float().view(one.shape).clone() for name, one in local.items()}


def apart(got: Tensor, want: Tensor) -> float:
    """The norm of the difference, of that of `want`."""
    return float((got - want).norm() / want.norm().clamp_min(1e-12))
