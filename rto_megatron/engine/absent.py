"""A model of other ranks: a rank that holds no shard of it makes the calls that all ranks make together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rto_megatron.engine.exchange import SUMS, everywhere, rows_everywhere
from rto_megatron.engine.finite import refuse_together
from rto_megatron.engine.megatron import FrozenModel, Loss, Microbatch, Model, TrainedModel
from rto_megatron.engine.readings import OUTPUTS, Reading
from rto_megatron.engine.router_health import no_report, router_metrics
from rto_megatron.models.shape import ModelShape
from rto_megatron.parallel.topology import Topology
from rto_megatron.types import Metrics, TokenBatch, ValueScale


@dataclass(frozen=True)
class AbsentModel:
    """What this rank knows of a model that lies on other ranks; what those compute with it, this rank hears.

    It follows a replica of the model (`Topology.following`): it has the replica's batches, and gets its outputs.

    Example:
        logprobs = policy.token_outputs(batches)
    """

    name: str
    shape: ModelShape
    has_scalar_head: bool
    scale: ValueScale
    dtype: torch.dtype  # of the weights
    topology: Topology
    is_balanced: bool = False  # trained with a load-balancing loss of its experts

    def token_outputs(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """See `FrozenModel.token_outputs`."""
        return self.begin_outputs(batches)()

    def begin_outputs(
        self, batches: Sequence[TokenBatch], reading: Reading[TokenBatch] = OUTPUTS
    ) -> Callable[[], list[Tensor]]:
        """Computes nothing; what it returns hears what that of `FrozenModel.begin_outputs` gives."""
        return partial(rows_everywhere, None, batches, reading.num_rows, self.topology)

    def outputs[M: Microbatch](self, microbatches: Sequence[M], reading: Reading[M]) -> list[Tensor]:
        """See `TrainedModel.outputs`."""
        return rows_everywhere(None, [m.batch for m in microbatches], reading.num_rows, self.topology)

    def accumulate[M: Microbatch](
        self,
        microbatches: Sequence[M],
        loss: Loss[M],
        names: Sequence[Sequence[str]],
        reading: Reading[M] | None = None,
    ) -> Callable[[], Metrics]:
        """Computes nothing; what it returns hears what that of `TrainedModel.accumulate` gives."""
        return self._settled

    def _settled(self) -> Metrics:
        topology = self.topology
        health = router_metrics(self.name, self.shape, no_report(self.shape), self.is_balanced, topology)
        metrics = {**everywhere({}, topology), **health}
        refuse_together({}, topology)  # of losses
        refuse_together({}, topology)  # of gradients
        return metrics

    def apply(self, lr: float) -> Metrics:
        """Hears what `TrainedModel.apply` gives."""
        return self.topology.heard({}, SUMS)


type FrozenRole = FrozenModel | AbsentModel
type TrainedRole = TrainedModel | AbsentModel
type RoleModel = Model | AbsentModel
