"""How the layers of a model are shared by pipeline stages, and by the chunks that an interleaved stage has of them.

Chunks are numbered in the order of the model. Of P stages stage p holds the chunks p, P + p, 2P + p and so on: one in
an ordinary pipeline, `virtual` of them in an interleaved one (arXiv 2104.04473, section 2.2). The first chunk has the
embedding, the last one what comes behind the layers.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from rto_megatron.config.training import StageLayers
from rto_megatron.models.families import FAMILIES, blocks
from rto_megatron.models.shape import ModelShape


@dataclass(frozen=True)
class PipelineCut:
    """The layers of every chunk, in the order of the model.

    Example:
        PipelineCut(pipeline=2, layers=(1, 1, 1, 1)).stage_of(2) == 0
    """

    pipeline: int
    layers: tuple[int, ...]

    def stage_of(self, layer: int) -> int:
        """The stage that holds a layer, counted from 0."""
        ends = accumulate(self.layers)
        return next(chunk for chunk, end in enumerate(ends) if layer < end) % self.pipeline

    def own_layers(self, stage: int, number: int) -> range:
        """The layers of a stage's chunk, of which `number` counts from 0 on each stage."""
        chunk = number * self.pipeline + stage
        first = sum(self.layers[:chunk])
        return range(first, first + self.layers[chunk])

    @property
    def of_stages(self) -> tuple[int, ...]:
        """The number of layers of every stage."""
        return tuple(sum(self.layers[stage :: self.pipeline]) for stage in range(self.pipeline))

    def in_flight(self) -> int:
        """Of how many layers a stage keeps the activations of a micro-batch at once, on the stage with the most.

        A stage makes as many forwards before its first backward as the schedule says: 1F1B the number of stages behind
        it, and one; interleaved twice the stages behind it, and a group of P micro-batches for every chunk but one.
        """
        virtual = len(self.layers) // self.pipeline
        held = []
        for stage, layers in enumerate(self.of_stages):
            behind = self.pipeline - 1 - stage
            passes = behind if virtual == 1 else 2 * behind + (virtual - 1) * self.pipeline
            held.append(-(-layers * (passes + 1) // virtual))
        return max(held)


@lru_cache(maxsize=256)
def pipeline_cut(
    shape: ModelShape, has_scalar_head: bool, pipeline: int, virtual: int = 1, stages: StageLayers = None
) -> PipelineCut:
    """The cut of a model that `models.layout_checks` finds nothing against.

    Args:
        pipeline, virtual: stages, and chunks of each.
        stages: layers of each stage; "auto": so that the fullest stage has as few parameters as can be; None: equal
            numbers. A stage whose layers its chunks cannot share evenly has more in the first of them.
    """
    if stages == "auto":
        of_stages = _balanced(shape, has_scalar_head, pipeline, virtual)
    elif stages is None:
        of_stages = [shape.num_layers // pipeline] * pipeline
    else:
        of_stages = list(stages)
    chunks = [num // virtual + (number < num % virtual) for number in range(virtual) for num in of_stages]
    return PipelineCut(pipeline, tuple(chunks))


def _balanced(shape: ModelShape, has_scalar_head: bool, pipeline: int, virtual: int) -> list[int]:
    """Layers of every stage: each goes to the stage that has the fewest parameters so far, embedding and head counted.

    Layers of unlike sizes count as much as they have on average. Of stages with equally few the first is next: its
    embedding is no work, and the head of the last one is.
    """
    layer = FAMILIES[shape.family].layer
    every = [one.num_parameters for index in range(shape.num_layers) for one in layer(shape, index)]
    mean = sum(every) / shape.num_layers
    sizes = [virtual * mean] * pipeline
    sizes[0] += blocks.embedding(shape).num_parameters
    sizes[-1] += blocks.head(shape, has_scalar_head).num_parameters
    layers = [virtual] * pipeline
    for _ in range(shape.num_layers - pipeline * virtual):
        least = min(range(pipeline), key=lambda stage: (sizes[stage], stage))
        layers[least] += 1
        sizes[least] += mean
    return layers
