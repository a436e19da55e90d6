"""A simulated step against the same step on real tensors: memory of every phase, as the allocator saw it."""

from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_ranks
from simulation.real_memory import measured_alone, measured_rank

from rto_megatron.config.load import load_recipe
from rto_megatron.config.plan import plan_stage
from rto_megatron.models.shape import Experts, ModelShape
from rto_megatron.planning.shapes import KNOWN_SHAPES
from rto_megatron.simulation.whole_job import simulate_job

RECIPES = Path(__file__).parents[2] / "launchers/recipes/quickstart"
SHAPE = replace(
    KNOWN_SHAPES["llama-3-8b"],
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=704,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    vocab_size=4096,
)
MIXTURE = replace(
    SHAPE,
    family="qwen3_moe",
    has_qk_norm=True,
    experts=Experts(num=8, per_token=2, ffn_hidden_size=256, layers=(0, 1, 2, 3), is_normalized=True),
)
SLOW = pytest.mark.slow
# (ranks, keys of `parallel`, policy); three micro-batches of a step show what stages keep.
LAYOUTS = {
    "tp2": (2, {"tensor": 2, "sequence": True}, SHAPE),
    "pp2": (2, {"pipeline": 2}, SHAPE),
    "pp2_v2": (2, {"pipeline": 2, "virtual": 2}, SHAPE),
    "cp2": (2, {"context": 2}, SHAPE),
    "ep2": (2, {"expert": 2, "expert_tensor": 1}, MIXTURE),
    "dp2": (2, {"distributed_optimizer": True}, SHAPE),
}
PLAIN = {"tensor": 1, "pipeline": 1}
OVERRIDES = (
    "precision.dtype=bf16",
    "data.max_prompt_tokens=256",
    "sampling.max_response_tokens=256",
    "batch.micro=2",
    "batch.train=12",
    "batch.rollout=12",
)


@pytest.mark.parametrize(
    "layout", [pytest.param(one, marks=SLOW) for one in ("tp2", "pp2", "pp2_v2", "cp2", "ep2", "dp2")]
)
def test_simulated_memory_is_that_of_real_tensors(layout: str) -> None:
    num_ranks, keys, policy = LAYOUTS[layout]
    changes = [f"parallel.{key}={str(value).lower()}" for key, value in {**PLAIN, **keys}.items()]
    plan = plan_stage(load_recipe(RECIPES / "rto.yaml", [*OVERRIDES, *changes]), num_ranks)
    shapes: dict[str, ModelShape] = {role.name: SHAPE for role in plan.roles}
    shapes |= {name: policy for name in ("policy", "reference", "dpo") if name in shapes}
    if layout.startswith("pp2"):  # stages compute on what others send
        real = run_ranks(num_ranks, measured_rank, plan, shapes, 3, timeout_seconds=400.0)
    else:
        real = run_ranks(1, measured_alone, plan, shapes, 3, timeout_seconds=400.0)
    simulated = simulate_job(plan, shapes, 3)
    assert {role.name for role in simulated[0].roles} == {"policy", "critic", "reference", "reward", "dpo"}
    assert len(simulated) == len(real)
    for rank, measured in zip(simulated, real, strict=True):
        assert rank.roles == measured.roles  # weights, gradients and optimizers, byte by byte
        peaks = {phase.name: phase.peak for phase in measured.phases}
        assert {phase.name: phase.peak for phase in rank.phases} == pytest.approx(peaks, rel=0.05)


def test_a_recomputed_mixture_keeps_nothing_of_its_last_micro_batch() -> None:
    """Beside what stays an optimizer step takes a scaled copy of a gradient, at most that of the embedding."""
    alone = (
        "parallel.tensor=1",
        "parallel.expert=1",
        "parallel.expert_tensor=null",
        "parallel.sequence=false",
    )
    keys = (
        "precision.dtype=bf16",
        "precision.recompute=true",
        "batch.micro=2",
        "batch.train=4",
        "data.max_length=512",
    )
    plan = plan_stage(load_recipe(RECIPES / "sft_experts.yaml", [*keys, *alone]), 1)
    (rank,) = simulate_job(plan, {"policy": MIXTURE}, 2)
    (step,) = (phase for phase in rank.phases if phase.name == "optimizer step")
    assert step.working < 1.2 * 4 * MIXTURE.vocab_size * MIXTURE.hidden_size
