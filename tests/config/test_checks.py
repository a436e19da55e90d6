"""Values that do not fit together are refused before anything is built."""

from pathlib import Path

import pytest

from rto_megatron.config.checks import find_problems, plan_batches, refuse, require_pool
from rto_megatron.config.load import load_recipe
from rto_megatron.config.schema import Stage
from rto_megatron.errors import UserError

RECIPES = Path(__file__).parents[2] / "launchers" / "recipes" / "llama3_8b"


def rto(*overrides: str) -> Stage:
    return load_recipe(RECIPES / "rto.yaml", overrides)


def dpo(*overrides: str) -> Stage:
    return load_recipe(RECIPES / "dpo.yaml", overrides)


def evaluation(*overrides: str) -> Stage:
    return load_recipe(RECIPES.parent / "quickstart" / "evaluate.yaml", overrides)


def test_batch_arithmetic_of_the_released_script() -> None:
    # 8 GPUs without model parallelism: accumulation 128 / 1 / 8 = 16, 1024 / 8 = 128 rollouts a rank, 8
    # updates.
    plan = plan_batches(rto("parallel.tensor=1"), world_size=8)
    assert (plan.data_parallel, plan.num_microbatches, plan.rollout_per_rank, plan.updates_per_rollout) == (
        8,
        16,
        128,
        8,
    )
    assert find_problems(rto("parallel.tensor=1"), 8, {"policy": 8192}) == []


@pytest.mark.parametrize(
    ("config", "world_size", "part"),
    [
        (rto("parallel.tensor=1", "parallel.sequence=true"), 4, "needs parallel.tensor > 1"),
        (rto("parallel.tensor=3"), 8, "3 x 1 = 3 does not divide the 8 ranks"),
        (rto("batch.train=3", "batch.micro=4"), 4, "0 whole micro-batches come out; set batch.train to 4"),
        (dpo("batch.train=130", "batch.micro=4"), 8, "set batch.train to 128 or 136"),
        (rto("batch.rollout=129", "batch.train=1", "parallel.tensor=2"), 4, "set batch.rollout to 130"),
        (rto("batch.rollout=64"), 4, "0 whole updates come out"),
        (rto("models.reward=null"), 4, "models.reward is missing"),
        (rto("models.dpo=null"), 4, "models.dpo is missing"),
        (dpo("models.reward=x"), 8, "models.reward=x is set, but stage dpo uses only policy, reference"),
        (dpo("models.random_init=true"), 8, "works for stage sft only"),
        (rto("data.max_prompt_tokens=8000"), 4, "= 9024 tokens, but models.policy reads at most 8192"),
        (rto("data.max_prompt_tokens=7168"), 4, "+ 1 for the end-of-sequence"),
        (dpo("data.max_prompt_tokens=2048"), 8, "leaves no room for an answer"),
        (rto("sampling.min_response_tokens=2000"), 4, "is above sampling.max_response_tokens=1024"),
        (rto("rollout.servers=[localhost]"), 4, "an address is written http://host:port"),
    ],
)
def test_each_mismatch_is_named_with_a_way_out(config: Stage, world_size: int, part: str) -> None:
    problems = find_problems(config, world_size, {"policy": 8192, "reward": 8192})
    assert [problem for problem in problems if part in problem], problems
    with pytest.raises(UserError):
        refuse(problems)


def test_reward_model_needs_room_for_the_end_of_a_cut_response_unless_it_overwrites_a_token() -> None:
    # 7168 + 1024 = 8192 tokens are sampled at most, and 8193 scored.
    limits = {"policy": 8192, "reward": 8192}
    for policy in ("penalise", "mask"):
        config = rto("data.max_prompt_tokens=7168", f"algorithm.truncated={policy}")
        (problem,) = find_problems(config, 4, limits)
        assert "= 8193 tokens, but models.reward reads at most 8192" in problem
    exact = ("data.max_prompt_tokens=7168", "algorithm.truncated=compat")
    assert find_problems(rto(*exact), 4, limits) == []
    assert find_problems(evaluation("data.max_prompt_tokens=88"), 2, {"policy": 128, "reward": 129}) == []
    assert len(find_problems(evaluation("data.max_prompt_tokens=88"), 2, {"reward": 128})) == 1


def test_evaluation_has_no_batch_arithmetic_but_its_replicas() -> None:
    plan = plan_batches(evaluation(), world_size=6)
    assert (plan.data_parallel, plan.train_per_rank, plan.rollout_per_rank) == (3, 0, 0)


def test_rto_without_dpo_reward_needs_no_dpo_model() -> None:
    assert find_problems(rto("models.dpo=null", "algorithm.beta_dpo=0"), 4, {}) == []


def test_sampling_stage_needs_servers_and_others_do_not() -> None:
    require_pool(dpo())
    require_pool(rto("rollout.servers=[http://127.0.0.1:8000]"))
    with pytest.raises(UserError, match=r"launchers/local\.sh"):
        require_pool(rto())
