"""Layouts of experts that cannot be are told at load, with the numbers and what fits."""

from dataclasses import replace
from pathlib import Path

import pytest

from rto_megatron.config.checks import find_problems
from rto_megatron.config.load import load_recipe
from rto_megatron.config.plan import fewest_ranks, layout_on
from rto_megatron.config.training import GridConfig, ParallelConfig
from rto_megatron.models.layout_checks import check_layout, idle_expert_keys
from rto_megatron.planning.shapes import KNOWN_SHAPES

RECIPE = Path(__file__).parents[2] / "launchers/recipes/qwen3_30b_a3b/dpo.yaml"
MIXTURE, DENSE = KNOWN_SHAPES["qwen3-30b-a3b"], KNOWN_SHAPES["qwen3-1.7b"]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            ["parallel.expert=6"],
            "parallel.expert x parallel.expert_tensor = 6 x 1 = 6 ranks for the experts of a stage, which the 16 ranks "
            "of a stage (tensor 2 x data 8) cannot be shared by; set parallel.expert to 4 (of [1, 2, 4, 8, 16])",
        ),
        (
            ["parallel.expert=32"],
            "set parallel.expert to 16 (of [1, 2, 4, 8, 16])",
        ),
        (
            ["parallel.expert_tensor=4"],
            "parallel.expert_tensor=4 does not divide parallel.tensor=2",
        ),
        (
            ["parallel.roles={reference: {expert: 3}}"],
            "parallel.roles.reference.expert x parallel.roles.reference.expert_tensor = 3 x 1 = 3 ranks",
        ),
    ],
)
def test_ranks_that_experts_cannot_share_are_told(keys: list[str], told: str) -> None:
    (problem,) = find_problems(load_recipe(RECIPE, keys), 32, {})
    assert told in problem


def test_a_sound_layout_has_no_problems_and_is_counted() -> None:
    config = load_recipe(RECIPE, [])
    assert find_problems(config, 32, {}) == []
    assert fewest_ranks(config.parallel) == 16  # two stages, the experts of each on eight ranks
    layout = layout_on(config.parallel, 32)
    assert (layout.expert_ranks, layout.expert_replicas, layout.data) == (8, 2, 8)


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        (
            GridConfig(expert=12),
            "models.policy: parallel.expert=12 does not divide the number of experts=128; it can be one of "
            "[1, 2, 4, 8, 16, 32, 64, 128]",
        ),
        (
            GridConfig(tensor=4, expert=2),
            "models.policy has experts on different ranks (parallel.expert=2), which over parallel.tensor=4 ranks "
            "needs sequence parallelism; set parallel.sequence=true",
        ),
    ],
)
def test_models_whose_experts_cannot_be_cut_are_told(grid: GridConfig, told: str) -> None:
    assert check_layout(MIXTURE, grid, "models.policy") == [told]


def test_an_experts_size_limits_its_own_ranks_alone() -> None:
    assert MIXTURE.experts is not None
    odd = replace(MIXTURE, experts=replace(MIXTURE.experts, ffn_hidden_size=770))
    assert check_layout(odd, GridConfig(tensor=4, sequence=True, expert_tensor=2), "models.policy") == []
    (problem,) = check_layout(odd, GridConfig(tensor=4, sequence=True), "models.policy")
    assert "parallel.tensor=4 does not divide an expert's intermediate size=770" in problem


def test_keys_without_experts_are_told() -> None:
    parallel = ParallelConfig(expert=2, roles={"reward": {"expert_tensor": 1}})
    shapes = {"policy": DENSE, "reference": DENSE, "reward": DENSE}
    assert idle_expert_keys(shapes, parallel) == [
        "parallel.expert=2 has no effect: no model of this layout (policy, reference) has experts; remove it",
        "parallel.roles.reward.expert_tensor=1 has no effect: no model of this layout (reward) has experts; remove it",
    ]
    assert idle_expert_keys({**shapes, "policy": MIXTURE, "reward": MIXTURE}, parallel) == []
