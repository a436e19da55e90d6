"""Which layers lie on which stage and chunk, and how many of them a stage keeps the activations of."""

from itertools import product
from math import prod

import pytest

from rto_megatron.models.parameters import parameter_map, stage_sizes
from rto_megatron.models.pipeline_cut import PipelineCut, pipeline_cut
from rto_megatron.planning.shapes import KNOWN_SHAPES

DEEP = KNOWN_SHAPES["llama-3-70b"]


def test_interleaved_stages_have_every_so_many_th_chunk() -> None:
    """Megatron's own picture, of eight layers on two stages: [0, 1] [4, 5] and [2, 3] [6, 7]."""
    cut = pipeline_cut(KNOWN_SHAPES["llama-3.2-1b"], False, pipeline=2, virtual=4)
    assert cut.layers == (2,) * 8
    assert [list(cut.own_layers(1, number)) for number in range(4)] == [[2, 3], [6, 7], [10, 11], [14, 15]]
    assert [cut.stage_of(layer) for layer in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(("virtual", "stages"), [(1, (3, 7, 6)), (2, (5, 7, 4)), (3, "auto"), (1, "auto")])
def test_every_layer_lies_on_one_chunk(virtual: int, stages: tuple[int, ...]) -> None:
    shape = KNOWN_SHAPES["llama-3.2-1b"]
    cut = pipeline_cut(shape, False, 3, virtual, stages)
    own = {(p, v): cut.own_layers(p, v) for p, v in product(range(3), range(virtual))}
    assert sorted(layer for layers in own.values() for layer in layers) == list(range(shape.num_layers))
    assert all(cut.stage_of(layer) == stage for (stage, _), layers in own.items() for layer in layers)
    firsts = [own[chunk % 3, chunk // 3].start for chunk in range(3 * virtual)]
    assert firsts == sorted(firsts)  # chunk after chunk, in the order of the model
    if stages != "auto":
        assert cut.of_stages == stages


@pytest.mark.parametrize("has_scalar_head", [False, True])
@pytest.mark.parametrize("name", ["llama-3-70b", "llama-3.2-1b"])
def test_auto_leaves_the_fullest_stage_the_fewest_parameters(name: str, has_scalar_head: bool) -> None:
    """Of all ways to share the layers out over three stages, each counted from the map."""
    shape = KNOWN_SHAPES[name]
    sizes: dict[int | str, int] = {}
    for parameter in parameter_map(shape, has_scalar_head):
        side = "behind" if parameter.is_output_side else "before"
        place = side if parameter.layer is None else parameter.layer
        sizes[place] = sizes.get(place, 0) + sum(map(prod, parameter.hf_shapes))
    layer, num = sizes[0], shape.num_layers
    ways = [(a, b, num - a - b) for a in range(1, num) for b in range(1, num - a)]
    fullest = min(
        max(a * layer + sizes["before"], b * layer, c * layer + sizes["behind"]) for a, b, c in ways
    )
    found = [sum(both) for both in stage_sizes(shape, has_scalar_head, 3, stages="auto")]
    assert max(found) == fullest
    assert sum(found) == sum(sizes.values())


def test_auto_of_the_70b_recipe() -> None:
    """Embedding and head are 1.23 layers each: 19 + 1.23, 21, 21 and 19 + 1.23, where 20 each would be 21.23."""
    assert pipeline_cut(DEEP, False, 4, 5, "auto").of_stages == (19, 21, 21, 19)


def _held(cut: PipelineCut, stage: int, num_microbatches: int) -> int:
    """The most layer activations that a stage keeps, by going through its schedule pass by pass."""
    virtual, pipeline = len(cut.layers) // cut.pipeline, cut.pipeline
    # Groups of `pipeline` micro-batches go through a chunk before the next chunk takes them.
    order = [
        number
        for _ in range(num_microbatches // pipeline)
        for number in range(virtual)
        for _ in range(pipeline)
    ]
    behind = pipeline - stage - 1
    warmup = behind if virtual == 1 else 2 * behind + (virtual - 1) * pipeline
    held = most = 0
    for done, number in enumerate(order):
        held += len(cut.own_layers(stage, number))
        most = max(most, held)
        if done >= warmup:  # one forward, one backward; chunks go backward in the opposite order
            held -= len(cut.own_layers(stage, virtual - 1 - order[done - warmup]))
    return most


@pytest.mark.parametrize(
    ("pipeline", "virtual", "factor"), [(4, 1, 1), (4, 5, 1 + 3 / 20), (8, 2, 1 + 7 / 16)]
)
def test_activations_in_flight_are_those_of_the_schedule(pipeline: int, virtual: int, factor: float) -> None:
    """And of Korthikanti et al. 2022, section 4.2.3: interleaving keeps 1 + (P - 1) / (P V) times the layers."""
    cut = pipeline_cut(DEEP, False, pipeline, virtual)
    held = [_held(cut, stage, 16 * pipeline) for stage in range(pipeline)]
    assert cut.in_flight() == max(held) == pytest.approx(DEEP.num_layers * factor)


def test_a_full_last_stage_keeps_less_than_a_full_first_one() -> None:
    first, last = (
        pipeline_cut(KNOWN_SHAPES["llama-3.2-1b"], False, 2, 1, stages) for stages in ((12, 4), (4, 12))
    )
    assert (first.in_flight(), last.in_flight()) == (24, 12)
    assert [max(_held(cut, stage, 8) for stage in (0, 1)) for cut in (first, last)] == [24, 12]
