"""One optimizer step of a model, as the guarded step of the trainer makes it."""

from collections.abc import Sequence

from rto_megatron.engine.megatron import Loss, Microbatch, TrainedModel
from rto_megatron.engine.readings import Reading
from rto_megatron.types import Metrics


def take_step[M: Microbatch](
    model: TrainedModel,
    microbatches: Sequence[M],
    loss: Loss[M],
    names: Sequence[Sequence[str]],
    lr: float,
    reading: Reading[M] | None = None,
) -> Metrics:
    """`gradients`, then `apply`."""
    return {**model.gradients(microbatches, loss, names, reading), **model.apply(lr)}
