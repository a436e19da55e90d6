"""Values that do not fit together are refused before anything is built."""

from pathlib import Path

import pytest

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.config.checks import find_problems, refuse, require_pool
from rto_megatron.config.load import load_recipe
from rto_megatron.config.plan import plan_stage
from rto_megatron.config.roles import roles_of
from rto_megatron.config.schema import Stage
from rto_megatron.errors import RecipeError

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
    released = ("parallel.tensor=1", "batch.micro=1")
    plan = plan_stage(rto(*released), world_size=8)
    batches = plan.batches
    assert (
        plan.layout.data,
        batches.num_microbatches,
        batches.rollout_per_rank,
        batches.updates_per_rollout,
    ) == (
        8,
        16,
        128,
        8,
    )
    assert find_problems(rto(*released), 8, {"policy": 8192}) == []


@pytest.mark.parametrize(
    ("config", "world_size", "part"),
    [
        (rto("parallel.tensor=1", "parallel.sequence=true"), 4, "needs parallel.tensor > 1"),
        (rto("parallel.tensor=3"), 8, "3 x 1 = 3 does not divide the 8 ranks"),
        (rto("batch.train=3", "batch.micro=4"), 4, "0 whole micro-batches come out; set batch.train to 4"),
        (dpo("batch.train=130", "batch.micro=4"), 8, "set batch.train to 128 or 136"),
        (dpo("batch.train=1"), 8, "is below the 2 data-parallel ranks"),
        (rto("batch.rollout=129", "batch.train=3", "parallel.tensor=2"), 4, "set batch.rollout to 130"),
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
        (rto("precision.kernels=transformer_engine", "precision.dtype=fp32"), 4, "set precision.dtype=bf16"),
    ],
)
def test_each_mismatch_is_named_with_a_way_out(config: Stage, world_size: int, part: str) -> None:
    problems = find_problems(config, world_size, {"policy": 8192, "reward": 8192})
    assert [problem for problem in problems if part in problem], problems
    with pytest.raises(RecipeError):
        refuse(problems)


def test_a_warmup_of_the_critic_leaves_steps_for_the_policy() -> None:
    (problem,) = find_problems(rto("run.steps=5", "algorithm.critic_warmup_steps=5"), 4, {})
    assert "critic_warmup_steps=5 leaves no step for the policy in a run of 5" in problem
    assert find_problems(rto("run.steps=5", "algorithm.critic_warmup_steps=4"), 4, {}) == []
    assert find_problems(rto("run.steps=null", "algorithm.critic_warmup_steps=5"), 4, {}) == []


def test_the_likeliest_tokens_are_chosen_in_one_way_alone() -> None:
    held_out = ("data.eval=x.jsonl", "evaluate.temperature=0")
    assert find_problems(rto(*held_out), 4, {}) == []
    problems = find_problems(
        rto(*held_out, "evaluate.top_p=0.9", "evaluate.top_k=4", "evaluate.num_samples=2"), 4, {}
    )
    for one, part in zip(
        problems, ("evaluate.top_p=0.9", "evaluate.top_k=4", "evaluate.num_samples=2"), strict=True
    ):
        assert part in one
    assert (
        find_problems(rto("data.eval=x.jsonl", "evaluate.top_p=0.9", "evaluate.num_samples=2"), 4, {}) == []
    )


def test_turns_that_are_learnt_in_place_are_joined_to_no_prompt() -> None:
    recipe = RECIPES / "sft.yaml"
    with pytest.raises(RecipeError, match="allow_non_prefix=true has no effect with loss_on=all"):
        load_recipe(recipe, ["data.loss_on=all", "data.allow_non_prefix=true"])
    assert load_recipe(recipe, ["data.loss_on=last", "data.allow_non_prefix=true"])


def test_keys_of_held_out_rows_need_some() -> None:
    for stage in ("sft", "dpo", "kto", "reward_model"):
        recipe = RECIPES / f"{stage}.yaml"
        named = load_recipe(recipe, ["data.eval=x.jsonl", "data.eval_samples=8", "run.eval_every=5"])
        assert find_problems(named, 8, {}) == []
        absent = load_recipe(recipe, ["data.eval=null", "data.eval_samples=8", "run.eval_every=5"])
        problems = find_problems(absent, 8, {})
        for key in ("data.eval_samples=8", "run.eval_every=5"):
            (problem,) = (one for one in problems if key in one)
            assert problem == f"{key} has no effect without data.eval; remove it or name held-out rows"
        assert any("data.eval is missing" in one for one in problems) == (stage == "reward_model")
        assert len(problems) == 2 + (stage == "reward_model")


def test_a_score_that_passes_needs_a_source_that_pays_responses(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text("def tokens(samples): ...\n\n\ndef response(samples): ...\n")
    given = ["data.eval=x.jsonl", "evaluate.pass_score=0.5", "models.reward=null"]
    tokens, response = (
        f"{{kind: function, name: {pays}, function: {tmp_path}/rules.py:{pays}, pays: {pays}}}"
        for pays in ("tokens", "response")
    )
    recipe = RECIPES.parent / "quickstart" / "grpo_function.yaml"
    problems = find_problems(load_recipe(recipe, [*given, f"rewards=[{tokens}]"]), 8, {})
    assert [
        one for one in problems if one.startswith("evaluate.pass_score=0.5 is of the score of a response")
    ]
    both = find_problems(load_recipe(recipe, [*given, f"rewards=[{tokens}, {response}]"]), 8, {})
    assert not [one for one in both if "pass_score" in one]


def test_reward_model_needs_room_for_the_end_of_a_cut_response_unless_it_overwrites_a_token() -> None:
    # 7168 + 1024 = 8192 tokens are sampled at most, and 8193 scored.
    limits = {"policy": 8192, "reward": 8192}
    for policy in ("penalise", "bootstrap", "mask"):
        config = rto("data.max_prompt_tokens=7168", f"algorithm.truncated={policy}")
        (problem,) = find_problems(config, 4, limits)
        assert "= 8193 tokens, but models.reward reads at most 8192" in problem
    exact = ("data.max_prompt_tokens=7168", "algorithm.truncated=compat")
    assert find_problems(rto(*exact), 4, limits) == []
    assert find_problems(evaluation("data.max_prompt_tokens=88"), 2, {"policy": 128, "reward": 129}) == []
    assert len(find_problems(evaluation("data.max_prompt_tokens=88"), 2, {"reward": 128})) == 1


def test_evaluation_has_no_batch_arithmetic_but_its_replicas() -> None:
    plan = plan_stage(evaluation(), world_size=6)
    assert (plan.layout.data, plan.batches.train_per_rank, plan.batches.rollout_per_rank) == (3, 0, 0)


WITH_DPO = [name for name, m in ALGORITHMS.items() if isinstance(m, OnlineMethod) and m.has_dpo]
OFF = ("models.dpo=null", "models.allow_unverified_reference=false")


def online(stage: str, *overrides: str) -> Stage:
    return load_recipe(RECIPES / f"{stage}.yaml", overrides)


@pytest.mark.parametrize("stage", WITH_DPO)
def test_a_dpo_reward_needs_a_dpo_model_and_no_reward_needs_none(stage: str) -> None:
    paid = "algorithm.beta_dpo=0.05"
    assert find_problems(online(stage, paid, "models.dpo=x"), 4, {}) == []
    (problem,) = find_problems(online(stage, paid, "models.dpo=null"), 4, {})
    assert f"models.dpo is missing: stage {stage} rewards tokens with a DPO model" in problem
    assert "algorithm.beta_dpo=0" in problem
    assert find_problems(online(stage, *OFF, "algorithm.beta_dpo=0"), 4, {}) == []


@pytest.mark.parametrize(
    "config",
    [
        *(
            online(stage, "models.dpo=null", "models.allow_unverified_reference=true", "algorithm.beta_dpo=0")
            for stage in WITH_DPO
        ),
        *(
            online(stage, "models.allow_unverified_reference=true")
            for stage in ("ppo", "reinforce_pp", "grpo", "dpo", "sft")
        ),
        evaluation("models.allow_unverified_reference=true"),
    ],
    ids=lambda config: config.stage,
)
def test_an_allowance_without_a_dpo_model_is_refused(config: Stage) -> None:
    (problem,) = find_problems(config, 4, {})
    assert problem == (
        "models.allow_unverified_reference=true has no effect where no DPO model is read; remove it"
    )


@pytest.mark.parametrize("role", ["dpo", "dpo_reference"])
def test_a_dpo_model_is_refused_where_it_is_never_read(role: str) -> None:
    (problem,) = find_problems(online("ppo", f"models.{role}=x"), 4, {})
    assert f"models.{role}=x is set, but stage ppo uses only policy, reference" in problem


@pytest.mark.parametrize("stage", ["reinforce_pp", "grpo", "rloo"])
def test_a_dpo_model_is_refused_until_its_reward_has_a_weight(stage: str) -> None:
    (problem,) = find_problems(online(stage, "models.dpo=x"), 4, {})
    assert problem == "models.dpo=x has no effect with algorithm.beta_dpo=0; remove it"


@pytest.mark.parametrize("key", ["top_p=0.9", "top_k=20"])
def test_the_likeliest_tokens_alone_are_for_methods_without_a_ratio(key: str) -> None:
    assert find_problems(online("rloo", f"sampling.{key}"), 4, {}) == []
    assert find_problems(evaluation(f"sampling.{key}"), 2, {}) == []
    for stage in ("ppo", "rto", "reinforce_pp", "grpo", "gspo", "cispo"):
        (problem,) = find_problems(online(stage, f"sampling.{key}"), 4, {})
        assert f"sampling.{key}: stage {stage} weighs tokens by the policy's ratio" in problem
        assert "take a method without a ratio (rloo)" in problem
    (problem,) = find_problems(online("rloo", f"sampling.{key}", "algorithm.pool_importance_cap=2"), 4, {})
    assert "algorithm.pool_importance_cap=2 would take that for a gap" in problem


def test_a_pool_that_sleeps_cannot_sample_again() -> None:
    keys = ("rollout.colocated=true", "rollout.gpu_memory_fraction=0.4")
    (problem,) = find_problems(online("dapo", *keys), 4, {})
    assert "algorithm.max_sampling_rounds=10 samples, scores and samples again" in problem
    assert find_problems(online("dapo", *keys, "algorithm.max_sampling_rounds=null"), 4, {}) == []


@pytest.mark.parametrize("stage", ["reinforce_pp", "rto_reinforce_pp", "grpo"])
def test_a_critic_is_refused_where_there_is_none(stage: str) -> None:
    (problem,) = find_problems(online(stage, "models.critic=x"), 4, {})
    assert f"models.critic=x is set, but stage {stage} uses only policy, reference, reward" in problem


@pytest.mark.parametrize("stage", ["sft", "simpo"])
def test_a_reference_is_refused_where_the_loss_has_none(stage: str) -> None:
    (problem,) = find_problems(online(stage, "models.reference=x"), 4, {})
    assert problem == f"models.reference=x is set, but stage {stage} uses only policy; remove it"


def test_tdpo_needs_a_reference_by_name() -> None:
    assert find_problems(online("tdpo"), 4, {}) == []
    config = online("tdpo", "models.reference=null")
    (problem,) = find_problems(config, 4, {})
    assert problem == (
        "models.reference is missing: stage tdpo compares the policy with a reference's whole distribution; "
        f"name it, most often models.reference={config.models.policy}"
    )


@pytest.mark.parametrize("stage", ["dpo", "rdpo", "kto"])
def test_other_preference_methods_take_the_start_of_the_policy(stage: str) -> None:
    config = online(stage, "models.reference=null")
    assert find_problems(config, 4, {}) == []
    paths = {role.name: role.path for role in roles_of(config)}
    assert paths["reference"] == paths["policy"]


@pytest.mark.parametrize("stage", ["ppo", "rto", "grpo"])
def test_a_weight_of_texts_needs_texts(stage: str) -> None:
    (problem,) = find_problems(online(stage, "algorithm.ptx_coef=0.1"), 4, {})
    assert problem == "algorithm.ptx_coef=0.1 has no effect without data.pretrain; remove it or name texts"
    for sound in (("data.pretrain=texts.jsonl",), ("data.pretrain=texts.jsonl", "algorithm.ptx_coef=0.1")):
        assert find_problems(online(stage, *sound), 4, {}) == []


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ("batch.rollout=24", "algorithm.samples_per_prompt=3", "batch.train=64"),
            "batch.rollout=24 x algorithm.samples_per_prompt=3 is not a multiple of batch.train=64, so 1 whole "
            "updates come out of a rollout step; change one of the three",
        ),
        (
            ("batch.rollout=20", "algorithm.samples_per_prompt=8", "batch.train=64"),
            "batch.rollout=20 x algorithm.samples_per_prompt=8 is not a multiple of batch.train=64, so 2 whole "
            "updates come out of a rollout step; set batch.rollout to 16",
        ),
        (
            ("batch.rollout=100", "batch.train=64"),
            "batch.rollout=100 is not a multiple of batch.train=64, so 1 whole updates come out of a rollout "
            "step; set batch.rollout to 64",
        ),
    ],
)
def test_responses_of_a_step_are_cut_into_whole_updates(overrides: tuple[str, ...], problem: str) -> None:
    assert find_problems(online("ppo", *overrides), 4, {}) == [problem]


def test_responses_of_a_step_are_prompts_times_samples() -> None:
    config = online("ppo", "batch.rollout=16", "algorithm.samples_per_prompt=8", "batch.train=64")
    assert find_problems(config, 4, {}) == []
    plan = plan_stage(config, 4)
    assert (plan.layout.data * plan.batches.rollout_per_rank, plan.batches.updates_per_rollout) == (128, 2)


def test_sampling_stage_needs_servers_and_others_do_not() -> None:
    require_pool(dpo())
    require_pool(rto("rollout.servers=[http://127.0.0.1:8000]"))
    with pytest.raises(RecipeError, match=r"launchers/local\.sh"):
        require_pool(rto())


def test_a_silent_server_has_the_time_of_its_probe() -> None:
    (problem,) = find_problems(rto("rollout.probe_interval_s=5", "rollout.probe_timeout_s=5"), 4, {})
    assert problem.startswith("rollout.probe_interval_s=5 is not above rollout.probe_timeout_s=5")
    assert find_problems(rto("rollout.probe_interval_s=5.5", "rollout.probe_timeout_s=5"), 4, {}) == []


def test_a_server_is_named_once() -> None:
    (problem,) = find_problems(rto("rollout.servers=[http://a:1,http://b:1,http://a:1]"), 4, {})
    assert problem == "rollout.servers names a server twice"


def test_steps_to_trace_that_the_run_does_not_have_are_named() -> None:
    recipe = Path(__file__).parents[2] / "launchers/recipes/quickstart/rto.yaml"
    config = load_recipe(recipe, ["run.profile=[20,21,40]"])
    (problem,) = find_problems(config, 2, {})
    assert "run.profile names step 21, 40, and the run has 20" in problem
    assert find_problems(load_recipe(recipe, ["run.profile=[1,20]"]), 2, {}) == []


def test_unequal_shares_need_no_multiple_of_the_replicas() -> None:
    assert find_problems(dpo("batch.train=131", "parallel.tensor=1"), 8, {"policy": 8192}) == []
    assert plan_stage(dpo("batch.train=131", "parallel.tensor=1"), 8).batches.num_microbatches is None
