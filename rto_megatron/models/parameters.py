"""The whole model's parameters, in the order of the forward pass, and where they live."""

from collections.abc import Iterable
from functools import cache

from rto_megatron.config.training import StageLayers
from rto_megatron.models.families import FAMILIES, blocks
from rto_megatron.models.pipeline_cut import PipelineCut, pipeline_cut
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import MappedParameter


def parameter_map(shape: ModelShape, has_scalar_head: bool) -> tuple[MappedParameter, ...]:
    """Embedding, layers, final norm and head: one map for import, export and weight sync."""
    layer = FAMILIES[shape.family].layer
    parameters = [blocks.embedding(shape)]
    for index in range(shape.num_layers):
        parameters.extend(layer(shape, index))
    final = blocks.norm("decoder.final_layernorm.weight", "model.norm.weight", shape.hidden_size, None, True)
    return (*parameters, final, blocks.head(shape, has_scalar_head))


def stored_parameters(shape: ModelShape, has_scalar_head: bool) -> tuple[MappedParameter, ...]:
    """Those that a checkpoint holds: without the tied copy of the last stage."""
    return tuple(p for p in parameter_map(shape, has_scalar_head) if not p.is_copy)


def hf_shapes(parameters: Iterable[MappedParameter]) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape, in the order of the parameters."""
    return {name: shape for p in parameters for name, shape in p.sizes()}


def stage_of(parameter: MappedParameter, cut: PipelineCut) -> int:
    """The pipeline stage that owns a parameter."""
    if parameter.layer is not None:
        return cut.stage_of(parameter.layer)
    return cut.pipeline - 1 if parameter.is_output_side else 0


@cache
def num_parameters(shape: ModelShape, has_scalar_head: bool) -> int:
    """Parameters of the model, each counted once."""
    return sum(p.num_parameters for p in stored_parameters(shape, has_scalar_head))


def stage_sizes(
    shape: ModelShape, has_scalar_head: bool, pipeline: int, virtual: int = 1, stages: StageLayers = None
) -> list[tuple[int, int]]:
    """Parameters of every pipeline stage, without experts and of all experts; a tied copy on the last one counts.

    Args:
        pipeline, virtual, stages: see `pipeline_cut`.
    """
    cut = pipeline_cut(shape, has_scalar_head, pipeline, virtual, stages)
    sizes = [[0, 0] for _ in range(pipeline)]
    for parameter in parameter_map(shape, has_scalar_head):
        if not parameter.is_copy or pipeline > 1:
            sizes[stage_of(parameter, cut)][parameter.expert is not None] += parameter.num_parameters
    return [(others, experts) for others, experts in sizes]
