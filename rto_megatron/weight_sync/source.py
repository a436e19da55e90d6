"""The trained policy as a source of Hugging Face tensors for the pool, straight from its shards."""

from collections.abc import Iterator

from torch import Tensor

from rto_megatron.engine.megatron import TrainedModel
from rto_megatron.engine.weights import stage_hf_tensors
from rto_megatron.models.parameters import stage_of, stored_parameters
from rto_megatron.models.weight_map import MappedParameter, dtype_name
from rto_megatron.weight_sync.manifest import TensorSpec


class PolicySource:
    """Plays the family's weight map backward; see `weight_sync.manifest.WeightSource`."""

    def __init__(self, policy: TrainedModel) -> None:
        self.policy = policy

    def _exported(self) -> Iterator[tuple[MappedParameter, int]]:
        shape, stages = self.policy.shape, self.policy.topology.pipeline_size
        mapped = stored_parameters(shape, self.policy.has_scalar_head)
        return ((p, stage_of(p, shape, stages)) for p in mapped)

    def specs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype, shape and owning pipeline stage of every tensor; equal on all ranks."""
        dtype = dtype_name(self.policy.module.config.params_dtype)
        return tuple(
            TensorSpec(name, dtype, size, stage) for p, stage in self._exported() for name, size in p.sizes()
        )

    def tensors(self, sender: int) -> Iterator[tuple[str, Tensor]]:
        """This rank's stage's tensors in the order of `specs`; all tensor ranks of the stage must iterate."""
        model = self.policy
        assert sender == model.topology.pipeline_rank
        return stage_hf_tensors(model.module, model.shape, model.has_scalar_head, model.topology)
