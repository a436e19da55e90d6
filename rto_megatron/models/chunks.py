"""The parts of a model that a rank holds: one, or of an interleaved pipeline several, others' layers between them."""

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from torch.nn import ModuleList

from rto_megatron.models.pipeline_cut import PipelineCut, pipeline_cut
from rto_megatron.models.shape import ModelShape
from rto_megatron.parallel.topology import Topology


class ModelChunks(ModuleList):
    """A rank's parts of one model, in the order of the model.

    Example:
        ModelChunks([build_model(shape, config, topology, False)]).last
    """

    @property
    def config(self) -> TransformerConfig:
        """Megatron's configuration of the whole model."""
        return self.last.config

    @property
    def chunks(self) -> list[GPTModel]:
        """All of them."""
        return list(self)

    @property
    def last(self) -> GPTModel:
        """The one that has what comes behind the layers, on the last stage."""
        return self[-1]


class StageLayout(PipelineParallelLayerLayout):  # type: ignore[misc]  # megatron-core has no types
    """Megatron's list of what stages hold, which knows this rank's stage where 0.19.2 asks the global state for it.

    Example:
        StageLayout(PipelineCut(2, (3, 1)), stage=1).get_layer_offset() == 3
    """

    def __init__(self, cut: PipelineCut, stage: int) -> None:
        rows = [["decoder"] * num_layers for num_layers in cut.layers]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        super().__init__(rows, cut.pipeline)
        self._cut, self._stage = cut, stage

    def get_num_layers_to_build(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """Of a chunk of this rank."""
        num_layers: int = self.layout[self._stage][vp_stage or 0].count(layer_type)
        return num_layers

    def get_layer_offset(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """How many layers of the model lie before those of a chunk of this rank."""
        return self._cut.own_layers(self._stage, vp_stage or 0).start


def cut_of(shape: ModelShape, has_scalar_head: bool, topology: Topology) -> PipelineCut:
    """Which layers lie on which stage of a layout."""
    sizes = (topology.pipeline_size, topology.virtual_size, topology.stages)
    return pipeline_cut(shape, has_scalar_head, *sizes)
