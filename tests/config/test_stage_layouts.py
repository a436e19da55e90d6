"""Pipelines whose stages cannot hold the layers are told at load, with the numbers and the nearest that can."""

from pathlib import Path

import pytest

from rto_megatron.config.checks import find_problems
from rto_megatron.config.load import load_recipe
from rto_megatron.config.training import GridConfig, StageLayers
from rto_megatron.errors import RecipeError
from rto_megatron.models.layout_checks import check_layout
from rto_megatron.planning.shapes import KNOWN_SHAPES

RECIPES = Path(__file__).parents[2] / "launchers/recipes"
RECIPE = RECIPES / "llama3_70b/rto.yaml"
DEEP = KNOWN_SHAPES["llama-3-70b"]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            ["parallel.stages=[20,30,30]"],
            "parallel.stages=[20, 30, 30] has the layers of 3 stages, and there are parallel.pipeline=4; name as many, "
            "or auto",
        ),
        (
            ["parallel.stages=[4,30,30,16]"],
            "parallel.virtual=5 chunks cannot share the 4 layers of the smallest stage of parallel.stages=[4, 30, 30, "
            "16]: each has one at least; set parallel.virtual to 4 at most",
        ),
        (
            ["parallel.pipeline=1", "parallel.stages=null"],
            "parallel.virtual=5 has no effect with parallel.pipeline=1; remove it or set parallel.pipeline",
        ),
        (
            ["parallel.roles={reward: {stages: [16]}}"],
            "parallel.roles.reward.stages=[16] has no effect with parallel.roles.reward.pipeline=1; remove it or set "
            "parallel.roles.reward.pipeline",
        ),
    ],
)
def test_stages_that_no_model_has_are_told(keys: list[str], told: str) -> None:
    assert find_problems(load_recipe(RECIPE, keys), 32, {}) == [told]


@pytest.mark.parametrize("stages", ["even", "4", "[]", "[1,x]", "[0,4]", "[true,3]"])
def test_what_is_no_list_of_layers_is_refused(stages: str) -> None:
    with pytest.raises(RecipeError, match=r"parallel\.stages.*expected auto, or the layers of each stage"):
        load_recipe(RECIPE, [f"parallel.stages={stages}"])


def _problems(pipeline: int, virtual: int, stages: StageLayers) -> list[str]:
    return check_layout(DEEP, GridConfig(pipeline=pipeline, virtual=virtual, stages=stages), "models.policy")


@pytest.mark.parametrize(
    ("pipeline", "virtual", "stages", "told"),
    [
        (
            4,
            3,
            None,
            "models.policy: parallel.pipeline x parallel.virtual = 4 x 3 = 12 does not divide num_hidden_layers=80; "
            "parallel.virtual can be one of [1, 2, 4, 5, 10, 20], or set parallel.stages=auto",
        ),
        (
            3,
            2,
            None,
            "models.policy: parallel.pipeline=3 does not divide num_hidden_layers=80; it can be one of "
            "[1, 2, 4, 5, 8, 10, 16, 20, 40, 80], or set parallel.stages=auto",
        ),
        (
            4,
            1,
            (20, 20, 20, 18),
            "models.policy: parallel.stages=[20, 20, 20, 18] has 78 layers, and num_hidden_layers=80; it can be "
            "[20, 20, 20, 20], or auto",
        ),
        (
            4,
            21,
            "auto",
            "models.policy: parallel.pipeline x parallel.virtual = 4 x 21 = 84 chunks have a layer each at least, and "
            "num_hidden_layers=80; set parallel.virtual to 20 at most",
        ),
    ],
)
def test_layers_that_stages_cannot_share_are_told(
    pipeline: int, virtual: int, stages: StageLayers, told: str
) -> None:
    assert _problems(pipeline, virtual, stages) == [told]


def test_sound_stages_have_no_problems() -> None:
    sound: list[tuple[int, int, StageLayers]] = [(4, 5, None), (3, 2, "auto"), (4, 2, (19, 21, 21, 19))]
    assert [_problems(*one) for one in sound] == [[]] * 3
    assert find_problems(load_recipe(RECIPE, ["parallel.stages=[19,21,21,19]"]), 32, {}) == []
