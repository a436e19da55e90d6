"""What a plan varies, and what of time and memory each variation takes."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from rto_megatron.config.load import load_recipe
from rto_megatron.config.plan import StagePlan
from rto_megatron.models.parameters import num_parameters
from rto_megatron.planning.candidates import shared_bytes
from rto_megatron.planning.gpus import KNOWN_GPUS, find_gpu
from rto_megatron.planning.judgement import judged
from rto_megatron.planning.memory import moved_bytes
from rto_megatron.planning.shapes import FoundShape
from rto_megatron.planning.step_time import EXPECTED
from rto_megatron.planning.variations import Overrides, refinements
from rto_megatron.planning.whole_step import Lengths, pipeline_idle, time_step

RECIPES = Path(__file__).parents[2] / "launchers/recipes"
GIB = 2**30


def planned(
    recipe: str, world_size: int, *keys: str, assume: tuple[str, ...] = ()
) -> tuple[StagePlan, dict[str, FoundShape]]:
    return judged(load_recipe(RECIPES / recipe, keys), world_size, list(assume), "")


def varied(
    recipe: str, world_size: int, *keys: str, held: tuple[str, ...] = ()
) -> Mapping[str, list[Overrides]]:
    plan, known = planned(recipe, world_size, *keys)
    shapes = {name: one.shape for name, one in known.items()}
    found = refinements(plan, shapes, KNOWN_GPUS["h100"], held)
    return {name: list(choices) for name, choices in found.items()}


def test_small_roles_lie_whole_or_on_ranks_of_their_own() -> None:
    found = varied("llama3_8b/rto.yaml", 8, "parallel.tensor=2")
    whole = ("parallel.roles.critic.tensor=1", "parallel.roles.reward.tensor=1")
    apart = [
        f"parallel.roles.{role}.{key}" for role in ("critic", "reward") for key in ("tensor=1", "ranks=4-7")
    ]
    assert found["roles"] == [
        (),
        whole,
        tuple(apart),
    ]  # 6 ranks of the policy would be 3 replicas for 1,024 prompts
    assert found["ahead"] == [(), ("rollout.ahead=1", "algorithm.pool_importance_cap=2")]
    assert found["offload"] == [(), ("offload=[reference, reward, dpo, gradients, optimizer]",)]
    assert "chunks" not in found
    judged(load_recipe(RECIPES / "llama3_8b/rto.yaml", ["parallel.tensor=2", *apart]), 8, [], "")


def test_what_the_user_gives_is_not_varied() -> None:
    held = ("rollout.ahead", "parallel.roles.critic.tensor", "offload")
    assert varied("llama3_8b/rto.yaml", 4, "parallel.tensor=2", held=held) == {}


def test_stages_are_cut_in_chunks_that_divide_the_layers() -> None:
    # 32 layers over 4 stages: 8 each, in 2 or 4 chunks.
    found = varied("llama3_8b/dpo.yaml", 8, "parallel.tensor=2", "parallel.pipeline=4")
    assert found["chunks"] == [(), ("parallel.virtual=2",), ("parallel.virtual=4",)]


def test_stages_wait_as_the_schedule_says() -> None:
    """arXiv 2104.04473, section 2: (P - 1) / M of the work, interleaved (P - 1) / (V M)."""
    assert pipeline_idle(4, 1, 12) == 3 / 12
    assert pipeline_idle(4, 5, 12) == pytest.approx(3 / 60)
    # Ten micro-batches are filled up to twelve, for which all wait.
    assert pipeline_idle(4, 5, 10) == pytest.approx((12 + 3 / 5) / 10 - 1)


def test_offload_moves_frozen_weights_once_and_optimizers_twice() -> None:
    keys = ("parallel.tensor=4", "parallel.pipeline=1", "offload=[reference, gradients, optimizer]")
    plan, known = planned("llama3_8b/dpo.yaml", 8, *keys)
    shapes = {name: one.shape for name, one in known.items()}
    size = num_parameters(shapes["policy"], False) / 4  # two replicas share the optimizer
    moved = moved_bytes(plan, shapes)
    assert moved == pytest.approx(2 * size + 2 * 12 / 2 * size, rel=0.001)
    gpu = KNOWN_GPUS["h100"]
    phases = {one.name: one for one in time_step(plan, shapes, gpu, 0, Lengths(512, 512)).phases}
    assert phases["offload"].seconds == moved / 25e9 and phases["offload"].limit_s == 0


def test_a_shared_gpu_is_as_full_as_its_fullest_turn() -> None:
    """All of the trainer is away while the pool samples: 0.8 of the GPU, two buckets and two processes, one of which
    every plan leaves out."""
    plan, known = planned("llama3_8b/rto_colocated.yaml", 8)
    gpu = find_gpu("80:989:3350")
    assert shared_bytes(plan, known, gpu, 1, None) == int(80 * GIB * 0.8) + 2 * (256 << 20) + GIB
    # A trainer that takes more while it trains than the pool does in its turn decides.
    assert shared_bytes(plan, known, gpu, 1, 70 * GIB) == 70 * GIB + 2 * (256 << 20) + GIB


@pytest.mark.parametrize(("pool_gpus", "longest"), [(1, "sample"), (64, "others")])
def test_rollouts_that_are_ahead_take_no_longer_than_what_they_lie_beside(
    pool_gpus: int, longest: str
) -> None:
    ahead = ("rollout.ahead=1", "algorithm.pool_importance_cap=2")
    for keys in ((), ahead):
        plan, known = planned("llama3_8b/rto.yaml", 8, "parallel.tensor=4", *keys)
        shapes = {name: one.shape for name, one in known.items()}
        found = time_step(plan, shapes, KNOWN_GPUS["h100"], pool_gpus, Lengths(512, 512))
        for in_all, by_phase in (
            (found.seconds / EXPECTED.overhead, {one.name: one.seconds for one in found.phases}),
            (found.limit_s, {one.name: one.limit_s for one in found.phases}),
        ):
            sample = by_phase.pop("sample")
            others = by_phase["push"] + by_phase["score"] + by_phase["update"]
            assert set(by_phase) == {"push", "score", "update"}
            assert (sample > others) == (longest == "sample")
            assert in_all == pytest.approx(max(sample, others) if keys else sample + others)


def test_roles_on_ranks_of_their_own_score_and_train_beside_the_others() -> None:
    keys = [f"parallel.roles.{role}.ranks=4-7" for role in ("critic", "reward")]
    times = {}
    for own in ((), keys):
        plan, known = planned("llama3_8b/rto.yaml", 8, "parallel.tensor=4", "precision.recompute=false", *own)
        shapes = {name: one.shape for name, one in known.items()}
        found = time_step(plan, shapes, KNOWN_GPUS["h100"], 8, Lengths(512, 512)).phases
        times[bool(own)] = {one.name: one.seconds for one in found}
    # The models of 8B have half the GPUs, twice the time; those of 1B are a tenth beside them, and finish before.
    tokens = 1024 * 1024
    of_8b = 2 * 7.505e9 * tokens + 2 * 32 * 4096 * 1024 * tokens
    assert times[True]["score"] == pytest.approx(3 * of_8b / (4 * 989e12 * 0.40), rel=0.01)
    assert times[True]["update"] == pytest.approx(3 * of_8b / (4 * 989e12 * 0.40), rel=0.01)
    assert times[False]["score"] < 0.6 * times[True]["score"]
