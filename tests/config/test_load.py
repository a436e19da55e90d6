"""Recipes: overrides, variables, and errors that name everything at once."""

from pathlib import Path

import pytest

from rto_megatron.algorithms import ALGORITHMS, rto
from rto_megatron.algorithms.method import OfflineMethod, OnlineMethod
from rto_megatron.config.load import dump, load_recipe, save
from rto_megatron.config.schema import STAGES, ActorCriticStage, ReinforcementStage
from rto_megatron.errors import RecipeError

SOUND = """
stage: rto
vars: {root: runs/x}
run: {dir: "${vars.root}/rto"}
models: {policy: p, reward: r, dpo: d}
data: {train: prompts.jsonl}
optimizer: {lr: 5e-7}
critic_optimizer: {lr: 9.0e-6}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_are_those_of_the_paper_and_the_released_script(tmp_path: Path) -> None:
    config = load_recipe(write(tmp_path, SOUND))
    assert isinstance(config, ActorCriticStage)
    assert isinstance(config.algorithm, rto.Config)
    assert (config.algorithm.beta_dpo, config.algorithm.dpo_clip, config.algorithm.beta_kl) == (
        0.05,
        0.05,
        0.01,
    )
    assert (config.algorithm.gamma, config.algorithm.lam, config.algorithm.clip_eps) == (1.0, 0.95, 0.2)
    assert (config.optimizer.betas, config.optimizer.warmup_fraction) == ((0.9, 0.95), 0.03)
    assert (config.batch.train, config.batch.rollout, config.data.max_prompt_tokens) == (128, 1024, 1024)
    assert config.optimizer.lr == 5e-7  # YAML 1.1 reads 5e-7, without a point, as text


def test_overrides_win_and_reach_variables(tmp_path: Path) -> None:
    config = load_recipe(
        write(tmp_path, SOUND), ["optimizer.lr=1e-6", "vars.root=elsewhere", "algorithm.dpo_clip=null"]
    )
    assert isinstance(config, ActorCriticStage)
    assert isinstance(config.algorithm, rto.Config)
    assert config.optimizer.lr == 1e-6
    assert config.run.dir == Path.cwd() / "elsewhere" / "rto"
    assert config.algorithm.dpo_clip is None


def test_pool_addresses_can_be_given_as_an_override(tmp_path: Path) -> None:
    config = load_recipe(
        write(tmp_path, SOUND), ["rollout.servers=[http://127.0.0.1:81,http://127.0.0.1:82]"]
    )
    assert isinstance(config, ReinforcementStage)
    assert config.rollout.servers == ("http://127.0.0.1:81", "http://127.0.0.1:82")


def test_paths_that_exist_become_absolute_and_hub_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(tmp_path, SOUND)
    (tmp_path / "p").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_recipe(recipe, ["models.reward=RTO-RL/Llama3.2-1B-RewardModel", "data.train=a/b:train"])
    assert config.models.policy == tmp_path / "p"
    assert config.models.reward == Path("RTO-RL/Llama3.2-1B-RewardModel")
    assert config.data.train == "a/b:train"


def test_saved_configuration_loads_to_the_same(tmp_path: Path) -> None:
    config = load_recipe(write(tmp_path, SOUND), ["optimizer.betas=[0.9,0.99]", "run.steps=3"])
    path = save(config, tmp_path / "run")
    assert load_recipe(path) == config
    assert path.read_text() == dump(config)


def test_all_problems_are_listed_with_place_value_and_nearest_name(tmp_path: Path) -> None:
    text = SOUND.replace("critic_optimizer: {lr: 9.0e-6}", "precision: {dtype: bf61}\nbatsh: {train: 4}")
    recipe = write(tmp_path, text.replace("reward: r", "rewrd: r"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, ["parallel.tensor=0", "parallel.tensr=2", "warmup_fraction=0.1"])
    message = str(caught.value)
    assert "7 problems" in message
    assert (
        f"{recipe}:5: models.rewrd: found 'r'; there is no such key; did you mean models.reward?" in message
    )
    assert (
        f"{recipe}:8: precision.dtype: found 'bf61'; must be 'fp32' or 'bf16'; did you mean bf16?" in message
    )
    assert f"{recipe}:9: batsh: found {{'train': 4}}; there is no such key; did you mean batch?" in message
    assert "command line: parallel.tensor: found 0; must be greater than or equal to 1" in message
    assert "did you mean parallel.tensor?" in message
    assert "did you mean optimizer.warmup_fraction?" in message
    assert "critic_optimizer: is missing; a section with the keys kind, lr" in message


@pytest.mark.parametrize(
    ("text", "overrides", "part"),
    [
        ("stage: rtoo\n", [], "did you mean rto?"),
        ("run: {}\n", [], "must be one of sft"),
        ("stage: [\n", [], "cannot be read as YAML"),
        ("a: 1\na: 2\n", [], "cannot be read as YAML"),
        ("", [], "holds no `key: value` pairs"),
        (SOUND, ["run.steps"], "an override is written key=value"),
        (SOUND, ["vars.rooot=x"], "vars.rooot: no key uses ${vars.rooot}; did you mean root?"),
        (SOUND.replace("runs/x", '"${oc.env:HOME}"'), [], "only names of keys may stand in"),
        (SOUND.replace("${vars.root}", "${vars.base}"), [], "vars.root: no key uses"),
    ],
)
def test_what_cannot_be_read_is_explained(tmp_path: Path, text: str, overrides: list[str], part: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text), overrides)
    assert part in str(caught.value)


def names_of(kind: type) -> list[str]:
    """Registered methods of a kind, in the order of the registry."""
    return [name for name, method in ALGORITHMS.items() if isinstance(method, kind)]


OFFLINE, ONLINE = names_of(OfflineMethod), names_of(OnlineMethod)
WITH_CRITIC = ["ppo", "rto", "semi_rto", "ddpo", "rs_ppo"]
CRITIC_FREE = ["reinforce_pp", "rto_reinforce_pp", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"]
WITH_DPO = ["rto", "semi_rto", "ddpo", "rs_ppo", *CRITIC_FREE]
KL_IN_REWARD = [*WITH_CRITIC, "reinforce_pp", "rto_reinforce_pp", "rloo"]


@pytest.mark.parametrize(
    ("stage", "key", "readers"),
    [
        ("rto", "data.max_length", OFFLINE),
        ("dpo", "evaluate.temperature", [*ONLINE, "evaluate"]),
        ("ppo", "algorithm.beta_dpo", WITH_DPO),
        *(("dpo", key, ONLINE) for key in ("run.samples_every", "batch.rollout", "data.pretrain")),
        ("dpo", "critic_optimizer.lr", WITH_CRITIC),
        *(
            ("evaluate", key, [*OFFLINE, *ONLINE])
            for key in (
                "run.steps",
                "run.eval_every",
                "run.save_every",
                "run.keep_checkpoints",
                "batch.train",
                "data.train",
                "precision.recompute",
                "parallel.distributed_optimizer",
            )
        ),
        ("evaluate", "data.max_length", OFFLINE),
        ("evaluate", "rollout.logprob_gap_alarm", ONLINE),
        ("dpo", "algorithm.pool_importance_cap", ONLINE),
        ("dpo", "algorithm.entropy_coef", ONLINE),
        ("dpo", "sampling.temperature", [*ONLINE, "evaluate"]),
        ("rloo", "algorithm.clip_eps", [n for n in ONLINE if n != "rloo"]),
        ("cispo", "algorithm.dual_clip", [n for n in ONLINE if n not in ("cispo", "rloo")]),
        ("ppo", "algorithm.max_sampling_rounds", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"]),
        *(
            (stage, key, WITH_CRITIC)
            for stage in CRITIC_FREE
            for key in (
                "critic_optimizer.lr",
                "algorithm.lam",
                "algorithm.value_clip",
                "algorithm.critic_warmup_steps",
            )
        ),
        *(("grpo", f"algorithm.{key}", KL_IN_REWARD) for key in ("kl_target", "kl_horizon")),
        ("rto", "algorithm.delimiters", ["semi_rto"]),
    ],
)
def test_key_that_the_stage_does_not_read_is_refused_with_the_stages_that_do(
    stage: str, key: str, readers: list[str]
) -> None:
    recipe = Path(__file__).parents[2] / "launchers" / "recipes" / "quickstart" / f"{stage}.yaml"
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [f"{key}=1"])
    assert "1 problem " in str(caught.value)
    assert str(caught.value).endswith(f"; only the stages {', '.join(readers)} read it")


def minimal(stage: str) -> str:
    """A recipe that leaves everything to the defaults."""
    lines = [
        f"stage: {stage}",
        "run: {dir: runs/x}",
        "models: {policy: p}",
        f"data: {{{'eval' if stage == 'evaluate' else 'train'}: rows.jsonl}}",
    ]
    if stage == "evaluate":
        return "\n".join([*lines, "evaluate: {name: SFT}"])
    lines.append("optimizer: {lr: 5.0e-7}")
    if issubclass(STAGES[stage], ActorCriticStage):
        lines.append("critic_optimizer: {lr: 9.0e-6}")
    return "\n".join(lines)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_loads_with_its_defaults_and_survives_being_saved(stage: str, tmp_path: Path) -> None:
    config = load_recipe(write(tmp_path, minimal(stage)))
    assert type(config) is STAGES[stage]
    if stage in ALGORITHMS:
        assert config.model_dump()["algorithm"] == ALGORITHMS[stage].config().model_dump()
    (tmp_path / "saved").mkdir()
    saved = write(tmp_path / "saved", dump(config))
    assert load_recipe(saved) == config
    assert dump(load_recipe(saved)) == dump(config)


@pytest.mark.parametrize("stage", [*OFFLINE, *ONLINE])
def test_values_away_from_the_defaults_survive_being_saved(stage: str, tmp_path: Path) -> None:
    overrides = ["optimizer.kind=sgd", "optimizer.max_grad_norm=null", "run.steps=3", "batch.packed=false"]
    if stage in ONLINE:
        overrides += ["algorithm.ema_beta=0.992", "algorithm.score_clip=null", "data.pretrain=texts.jsonl"]
    if stage in WITH_DPO:
        overrides += ["algorithm.beta_dpo=0.1", "algorithm.dpo_clip=null", "models.dpo_reference=q"]
    config = load_recipe(write(tmp_path, minimal(stage)), overrides)
    (tmp_path / "saved").mkdir()
    assert load_recipe(write(tmp_path / "saved", dump(config))) == config
    assert config != load_recipe(write(tmp_path, minimal(stage)))


SMOOTHED = [name for name in OFFLINE if "label_smoothing" in ALGORITHMS[name].config.model_fields]


@pytest.mark.parametrize("value", [0.5, -0.1])
@pytest.mark.parametrize("stage", SMOOTHED)
def test_label_smoothing_is_a_probability_below_one_half(stage: str, value: float, tmp_path: Path) -> None:
    recipe = write(tmp_path, minimal(stage))
    rule = "less than 0.5" if value > 0 else "greater than or equal to 0"
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [f"algorithm.label_smoothing={value}"])
    assert f"algorithm.label_smoothing: found {value}; must be {rule}" in str(caught.value)
    for allowed in (0.0, 0.49):
        load_recipe(recipe, [f"algorithm.label_smoothing={allowed}"])


def test_the_methods_with_label_smoothing_are_those_of_pairs_with_bradley_terry() -> None:
    assert SMOOTHED == ["dpo", "rdpo", "simpo"]


@pytest.mark.parametrize("stage", ["reinforce_pp", "grpo"])
def test_bootstrap_needs_a_critic(stage: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"found 'bootstrap'; must be 'compat', 'penalise' or 'mask'"):
        load_recipe(write(tmp_path, minimal(stage)), ["algorithm.truncated=bootstrap"])
    load_recipe(write(tmp_path, minimal("ppo")), ["algorithm.truncated=bootstrap"])


def test_a_clip_that_no_score_reaches_is_refused(tmp_path: Path) -> None:
    recipe = write(tmp_path, minimal("ppo"))
    with pytest.raises(RecipeError, match="score_clip=10 has no effect with score_limit=5"):
        load_recipe(recipe, ["algorithm.score_limit=5"])
    load_recipe(recipe, ["algorithm.score_limit=5", "algorithm.score_clip=null"])


def test_a_group_has_at_least_two_responses(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"samples_per_prompt: found 1; must be greater than or equal to 2"):
        load_recipe(write(tmp_path, minimal("grpo")), ["algorithm.samples_per_prompt=1"])


def test_missing_recipe_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, SOUND)
    with pytest.raises(RecipeError, match=r"did you mean .*/recipe\.yaml\?"):
        load_recipe(tmp_path / "recip.yaml")


def test_dpo_keeps_its_default_batch_when_another_batch_key_is_set(tmp_path: Path) -> None:
    text = """
stage: dpo
run: {dir: runs/x}
models: {policy: p}
data: {train: pairs.jsonl}
batch: {micro: 2}
optimizer: {lr: 5e-7}
"""
    assert load_recipe(write(tmp_path, text)).batch.train == 256


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ("schedule=constant", "min_lr_fraction=0.5"),
            "min_lr_fraction=0.5 has no effect with schedule=constant",
        ),
        (("kind=sgd", "betas=[0.9,0.99]"), "betas=[0.9, 0.99] has no effect with kind=sgd"),
        (("kind=sgd", "eps=1e-6"), "eps=1e-06 has no effect with kind=sgd"),
        (("betas=[0.9,1]",), "betas.1: found 1; must be less than 1"),
        (("eps=0",), "eps: found 0; must be greater than 0"),
    ],
)
@pytest.mark.parametrize("section", ["optimizer", "critic_optimizer"])
def test_keys_that_an_optimizer_does_not_read_are_refused(
    section: str, given: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, SOUND), [f"{section}.{one}" for one in given])
    assert said in str(caught.value)


def test_keys_that_an_optimizer_reads_are_taken(tmp_path: Path) -> None:
    for given in (("kind=adam", "betas=[0.8,0.9]", "eps=1e-6"), ("schedule=cosine", "min_lr_fraction=0.5")):
        load_recipe(write(tmp_path, SOUND), [f"optimizer.{one}" for one in given])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("run.save_every=yes", "run.save_every"),
        ("run.steps=on", "run.steps"),
        ("run.profile=[2, true]", "run.profile.1"),
        ("algorithm.entropy_coef=no", "algorithm.entropy_coef"),
        ("rewards=[{kind: model, weight: true}]", "rewards.0.weight"),
        ("parallel.roles={critic: {tensor: true}}", "parallel.roles.critic.tensor"),
    ],
)
def test_a_truth_value_is_no_number(override: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"{key}: found a truth value .*; must be a number"):
        load_recipe(write(tmp_path, SOUND), [override])


def test_truth_values_are_taken_where_there_is_a_choice(tmp_path: Path) -> None:
    given = ["precision.recompute=yes", "parallel.sequence=false", "data.template={loud: true, level: 1}"]
    config = load_recipe(write(tmp_path, SOUND), given)
    assert isinstance(config, ActorCriticStage)
    assert (config.precision.recompute, config.parallel.sequence) == (True, False)
    assert config.data.template == {"loud": True, "level": 1}
