"""An exponential moving average of a trained model's weights, kept in float32 and sharded as the model is."""

import torch

from rto_megatron.config import schema
from rto_megatron.engine.megatron import FrozenModel, TrainedModel
from rto_megatron.engine.roles import build_frozen
from rto_megatron.engine.source import WeightSource


def build_average(model: TrainedModel, source: WeightSource) -> FrozenModel:
    """An average that starts at `source`, as the model did; its name is the model's with `_ema`."""
    precision = schema.FrozenPrecisionConfig(dtype="fp32")
    return build_frozen(f"{model.name}_ema", source, model.has_scalar_head, precision, model.topology)


@torch.no_grad()
def update_average(average: FrozenModel, model: TrainedModel, beta: float) -> None:
    """average <- beta average + (1 - beta) model; call it after every optimizer step.

    Source: OpenRLHF 0.4.4, utils/deepspeed/deepspeed.py:moving_average.
    """
    for mean, weight in zip(average.module.parameters(), model.module.parameters(), strict=True):
        mean.lerp_(weight.float(), 1 - beta)
