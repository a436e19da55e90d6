"""Memory of trainer and pool on the same GPUs, against numbers worked out by hand; placement of the servers."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.config.load import load_recipe
from rto_megatron.config.plan import plan_stage
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.errors import RecipeError
from rto_megatron.planning.activation_memory import activation_bytes
from rto_megatron.planning.colocated_memory import (
    SharedGpu,
    cache_bytes_per_token,
    largest_bucket_bytes,
    memory_problems,
    phase_memory,
    pool_weight_bytes,
    shared_sizes,
)
from rto_megatron.planning.judgement import judged
from rto_megatron.planning.memory import gib
from rto_megatron.planning.shapes import KNOWN_SHAPES, FoundShape

RECIPE = Path(__file__).parents[2] / "launchers" / "recipes" / "llama3_8b" / "ppo.yaml"
EIGHT_B = KNOWN_SHAPES["llama-3-8b"]
GIB = 1 << 30


def config(*overrides: str) -> ReinforcementStage:
    given = ["rollout.colocated=true", "rollout.gpu_memory_fraction=0.4", "parallel.tensor=4", *overrides]
    loaded = load_recipe(RECIPE, given)
    assert isinstance(loaded, ReinforcementStage)
    return loaded


def test_a_bucket_grows_to_the_largest_shard_of_a_tensor() -> None:
    # The embedding: 128256 x 4096 numbers of 2 bytes = 1002 MiB, a quarter of it on a rank of four.
    assert largest_bucket_bytes(EIGHT_B, 2, tensor=1, bucket_bytes=256 << 20) == 128256 * 4096 * 2
    assert largest_bucket_bytes(EIGHT_B, 2, tensor=4, bucket_bytes=256 << 20) == 256 << 20
    assert largest_bucket_bytes(EIGHT_B, 2, tensor=4, bucket_bytes=1 << 20) == 128256 * 4096 // 2


def test_weights_and_cache_of_one_worker() -> None:
    assert pool_weight_bytes(EIGHT_B, 2, pool_tensor=2) == 8_030_261_248
    # Keys and values of 32 layers, 8 heads of 128 numbers of 2 bytes.
    assert cache_bytes_per_token(EIGHT_B, 2, pool_tensor=1) == 2 * 32 * 8 * 128 * 2 == 131_072
    assert cache_bytes_per_token(EIGHT_B, 2, pool_tensor=4) == 131_072 // 4
    assert cache_bytes_per_token(EIGHT_B, 2, pool_tensor=16) == 131_072 // 8  # a head is not cut


def test_every_phase_is_the_sum_of_what_lies_in_memory_in_it() -> None:
    recipe = config("rollout.bucket_mb=512", "parallel.distributed_optimizer=false")
    shapes = {name: FoundShape(EIGHT_B, "test") for name in ("policy", "reference")}
    gpu = SharedGpu(80 * GIB, 0.4, pool_tensor=2)
    plan = plan_stage(recipe, 8)
    phases = phase_memory(plan, shapes, gpu)
    # 2,007.6 M parameters on a rank: 18 bytes each of the policy, 2 of the reference (critic and reward unknown).
    per_rank = -(-8_030_261_248 // 4)
    window = 2 * (512 << 20)
    always = (18 + 2) * per_rank + window + 2 * GIB
    assert [phase.name for phase in phases] == ["training", "weight push", "generation"]
    training, push, generation = (phase.total for phase in phases)
    assert training == always + activation_bytes(plan, shapes)
    # A push adds the shard, as many buckets on the worker's side and, while it loads, a layer: the embedding's half.
    assert push == always + 8_030_261_248 + window + 128256 * 4096
    assert generation == always + int(0.4 * 80 * GIB)
    assert memory_problems(recipe, EIGHT_B, phases, gpu) == []


def problems(fraction: float, gib: int, *overrides: str) -> str:
    recipe = config(*overrides)
    shapes = {name: FoundShape(EIGHT_B, "test") for name in ("policy", "reference")}
    gpu = SharedGpu(gib * GIB, fraction)
    return "\n".join(memory_problems(recipe, EIGHT_B, phase_memory(plan_stage(recipe, 4), shapes, gpu), gpu))


def test_what_does_not_fit_is_refused_with_the_fraction_that_does() -> None:
    # 20 bytes x 2,007.6 M + 2 buckets of 256 MiB + 2 GiB = 39.9 GiB; 40.1 GiB of 80 are left: 0.50.
    assert problems(0.50, 80) == ""
    said = problems(0.6, 80)
    assert "generation takes 87.9 GiB of a GPU's 80.0 GiB" in said
    assert "lower rollout.gpu_memory_fraction from 0.6 to 0.5 or less" in said
    assert "weight push" not in said


def test_a_trainer_that_leaves_no_room_is_told_so() -> None:
    said = problems(0.3, 40)
    assert "training takes" in said and "use more GPUs" in said
    assert "no rollout.gpu_memory_fraction fits" in said


def test_a_pool_without_room_for_one_sequence_is_refused() -> None:
    # 15.0 GiB of weights and 2048 tokens x 128 KiB = 0.25 GiB of cache; 0.18 of 80 GiB are 14.4.
    said = problems(0.18, 80, "data.max_prompt_tokens=1024", "sampling.max_response_tokens=1024")
    assert "gives the pool 14.4 GiB of a GPU" in said and "take 15.2 GiB; raise it above 0.2" in said


def check(*arguments: str) -> tuple[int, str]:
    shown = CliRunner().invoke(app, ["check", str(RECIPE), "--gpus", "8", *arguments])
    return shown.exit_code, shown.output + str(shown.exception or "")


def test_check_shows_the_phases_and_refuses_what_does_not_fit() -> None:
    share = ["rollout.colocated=true", "rollout.gpu_memory_fraction=0.3"]
    code, shown = check(*share, "--gpu-gib", "80")
    assert code == 0
    assert "the trainer's GPUs, in turn" in shown and "phases of a step on a GPU of 80 GiB" in shown
    assert "8 = tensor" in shown  # every GPU has a trainer rank
    code, shown = check(*share, "--gpu-gib", "40")
    assert code != 0 and "of a GPU's 40.0 GiB" in shown


def test_colocated_without_a_fraction_or_with_a_pool_of_its_own_is_refused() -> None:
    assert "needs rollout.gpu_memory_fraction" in check("rollout.colocated=true")[1]
    share = ["rollout.colocated=true", "rollout.gpu_memory_fraction=0.4"]
    assert "--pool-gpus has no effect" in check(*share, "--pool-gpus", "4")[1]
    assert "needs rollout.colocated=true" in check("--gpu-gib", "80")[1]


def test_servers_of_a_cpu_machine_take_no_gpus() -> None:
    assert shared_sizes(config(), 0, None, None, None, "1") == [1]
    assert shared_sizes(config(), 0, None, None, 2, "1") == [1, 1]


def test_a_server_without_a_trainer_rank_on_its_gpu_is_refused() -> None:
    with pytest.raises(RecipeError, match="take 8 GPUs, and 4 have a trainer rank"):
        shared_sizes(config(), 8, 4, None, 8, "1")


def test_what_waits_in_host_memory_is_in_no_phase_that_does_without_it() -> None:
    shapes = {name: FoundShape(EIGHT_B, "test") for name in ("policy", "reference")}
    gpu, per_rank = SharedGpu(80 * GIB, 0.4), -(-8_030_261_248 // 4)
    named = "offload=[policy,critic,reference,gradients,optimizer]"
    for optimizer, state in (("false", 12), ("true", 6)):  # two replicas
        recipe = config(named, f"parallel.distributed_optimizer={optimizer}")
        training, push, generation = phase_memory(plan_stage(recipe, 8), shapes, gpu)
        models = "trainer's models and optimizers"
        # bf16 weights, an fp32 gradient, masters and moments: no reference while updating, no optimizer while pushing.
        assert training.parts[models] == per_rank * (2 + 4 + state)
        assert push.parts[models] == per_rank * 2
        assert generation.parts[models] == 0


@pytest.mark.parametrize(
    ("page", "begins", "recipe", "overrides"),
    [
        ("offload.md", "| `offload: []` |", "rto_colocated.yaml", ("offload=[]",)),
        ("offload.md", "| as it is |", "rto_colocated.yaml", ()),
        (
            "pool.md",
            "of 80 GiB with fraction 0.4 and nothing in `offload`",
            "rto.yaml",
            ("rollout.colocated=true", "rollout.gpu_memory_fraction=0.4"),
        ),
    ],
)
def test_pages_have_the_figures_of_today(
    page: str, begins: str, recipe: str, overrides: tuple[str, ...]
) -> None:
    loaded = load_recipe(RECIPE.with_name(recipe), overrides)
    assert isinstance(loaded, ReinforcementStage) and loaded.rollout.gpu_memory_fraction is not None
    plan, shapes = judged(loaded, 8, [], "")
    phases = phase_memory(plan, shapes, SharedGpu(80 * GIB, loaded.rollout.gpu_memory_fraction, 1))
    lines = (RECIPE.parents[3] / "docs" / page).read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(begins))
    assert re.findall(r"[\d.]+ GiB", line)[-3:] == [gib(phase.total) for phase in phases]
