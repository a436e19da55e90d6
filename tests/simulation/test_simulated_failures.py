"""A simulated job fails where the real one would, and says at which rank, in which phase and where."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from rto_megatron.config.load import load_recipe
from rto_megatron.config.plan import StagePlan, plan_stage
from rto_megatron.engine.absent import RoleModel
from rto_megatron.engine.megatron import TrainedModel
from rto_megatron.errors import RecipeError
from rto_megatron.models.shape import ModelShape
from rto_megatron.planning.shapes import KNOWN_SHAPES
from rto_megatron.simulation.lone_rank import joined
from rto_megatron.simulation.rank_steps import SimulatedStep
from rto_megatron.simulation.stage_steps import simulate_step
from rto_megatron.simulation.whole_job import SimulationFailed, simulate_job

SFT = Path(__file__).parents[2] / "launchers/recipes/quickstart/sft.yaml"
SHAPE = replace(
    KNOWN_SHAPES["llama-3-8b"],
    num_layers=2,
    hidden_size=128,
    ffn_hidden_size=352,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=512,
)


def _plan(*keys: str) -> StagePlan:
    return plan_stage(load_recipe(SFT, ["parallel.tensor=1", "data.max_length=64", *keys]), 1)


def test_shapes_that_do_not_fit_fail_with_rank_phase_and_place() -> None:
    """Three heads of keys and values are no groups of four heads of queries."""
    with pytest.raises(
        SimulationFailed, match=r"^rank 0 of 1 would fail in phase \w+: .+ \(.+\.py:\d+, \w+\)$"
    ):
        simulate_job(_plan(), {"policy": replace(SHAPE, num_kv_heads=3)})


class WithUnreadWeights(SimulatedStep):
    """Of which the policy got a parameter that no layer reads."""

    def hold(self, found: Mapping[str, RoleModel | None]) -> None:
        """See `SimulatedStep.hold`."""
        policy = found["policy"]
        assert isinstance(policy, TrainedModel)
        unread = torch.nn.Parameter(torch.empty(3))
        unread.main_grad = torch.zeros(3)  # as Megatron gives every parameter
        policy.module.last.register_parameter("unread", unread)
        super().hold(found)


def _told(plan: StagePlan, shapes: Mapping[str, ModelShape]) -> str:
    with joined(plan.config, 0, 1) as topology:
        try:
            simulate_step(WithUnreadWeights(plan, shapes, topology, 2))
        except RecipeError as error:
            return str(error)
    return "nothing"


def test_a_parameter_that_no_gradient_reaches_fails_by_its_name() -> None:
    (told,) = run_ranks(1, _told, _plan(), {"policy": SHAPE})
    assert told.startswith("no gradient reaches 1 parameters of policy, the first ['") and "unread" in told
