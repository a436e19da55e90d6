"""Whole tensors of a trained model, from the shards of its ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

from rto_megatron.engine.megatron import TrainedModel
from rto_megatron.engine.weights import local_parameters
from rto_megatron.models.parameters import parameter_map
from rto_megatron.models.weight_map import merge


def whole(model: TrainedModel, value: Callable[[torch.nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """Whole tensors of this rank's pipeline stage, by Hugging Face name."""
    place, local, found = model.topology, local_parameters(model.module), {}
    for mapped in parameter_map(model.shape, model.has_scalar_head):
        if mapped.is_copy or mapped.megatron not in local:
            continue
        shards = place.gather_tensor_shards(value(local[mapped.megatron]).detach().float())
        found.update(zip(mapped.hf, merge(mapped.layout, shards), strict=True))
    return {name: tensor.clone() for name, tensor in found.items()}
