"""Overrides of text are taken as they are written, and whatever is launched or saved loads to the same."""

import re
from pathlib import Path

import pytest
from config.test_load import SOUND, write

from rto_megatron.config import schema
from rto_megatron.config.load import dump, load_recipe
from rto_megatron.config.overrides import as_override
from rto_megatron.config.schema import STAGES, ActorCriticStage
from rto_megatron.errors import RecipeError

# What YAML would cut, read as something else or refuse; and what names no key of the recipe.
NASTY = [
    "exp #1", "a: b", "it's", 'a "quoted" name', "[x", "x]", "{x}", "$HOME", "${", "${x", "$", "${a b}", "1e5", "on",
    "2024-01-01", "0x1f", "~", "- a", "*a", "&a", "!a", "%a", "@a", "a\\b", "a=b", " a ", "'a'", "a\nb", "-1", "é",
]  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
def test_a_path_and_a_name_are_taken_as_they_are_written(name: str, tmp_path: Path) -> None:
    recipe = write(tmp_path, SOUND)
    given = [f"run.dir=/x/{name}", f"data.train=/y/{name}.jsonl", f"models.policy=/z/{name}"]
    config = load_recipe(recipe, given)
    assert str(config.run.dir) == f"/x/{name}"
    assert isinstance(config, ActorCriticStage)
    assert config.data.train == f"/y/{name}.jsonl"
    assert str(config.models.policy) == f"/z/{name}"
    through_variable = load_recipe(recipe, [f"vars.root=/x/{name}"])
    assert str(through_variable.run.dir) == f"/x/{name}/rto"
    (tmp_path / "saved").mkdir()
    saved = write(tmp_path / "saved", dump(config))
    assert load_recipe(saved) == config
    assert dump(load_recipe(saved)) == dump(config)


@pytest.mark.parametrize("name", NASTY)
def test_a_bare_name_survives_being_saved(name: str, tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "launchers" / "recipes" / "quickstart" / "evaluate.yaml"
    config = load_recipe(recipe, [f"evaluate.name={name}", f"vars.system={name}"])
    assert isinstance(config, schema.EvaluateStage)
    assert config.evaluate.name == name
    assert load_recipe(write(tmp_path, dump(config))) == config


@pytest.mark.parametrize(
    "name", [*NASTY, "${vars.root}", "${oc.env:HOME}", "\\${vars.root}", "a\\\\${run.dir}b"]
)
def test_what_a_launcher_hands_on_is_the_path_that_it_has(name: str, tmp_path: Path) -> None:
    config = load_recipe(write(tmp_path, SOUND), [as_override("rollout.token_file", Path("/x") / name)])
    assert isinstance(config, ActorCriticStage)
    assert config.rollout.token_file == Path("/x") / name
    assert load_recipe(write(tmp_path, dump(config))) == config


def test_numbers_truth_values_and_lists_stay_yaml(tmp_path: Path) -> None:
    given = [
        "optimizer.betas=[0.8, 0.9]",
        "batch.packed=off",
        "run.steps=0x10",
        "optimizer.lr=1e-5",
        "run.seed=1_000",
    ]
    config = load_recipe(write(tmp_path, SOUND), [*given, "rollout.servers=['http://[::1]:81', http://b:82]"])
    assert isinstance(config, ActorCriticStage)
    assert (config.optimizer.betas, config.batch.packed, config.run.steps) == ((0.8, 0.9), False, 16)
    assert (config.optimizer.lr, config.run.seed) == (1e-5, 1000)
    assert config.rollout.servers == ("http://[::1]:81", "http://b:82")


def test_null_unsets_text_and_an_empty_text_is_refused(tmp_path: Path) -> None:
    recipe = write(tmp_path, SOUND.replace("policy: p", "policy: p, reference: q"))
    assert load_recipe(recipe, ["models.reference=null"]).models.reference is None
    assert load_recipe(recipe, ["models.reference=Null"]).models.reference == Path("Null")
    for key in ("run.dir", "models.reference", "data.train", "vars.root"):
        with pytest.raises(
            RecipeError, match=rf"command line: {key}: is empty; give a value, or null for none"
        ):
            load_recipe(recipe, [f"{key}="])
    with pytest.raises(RecipeError, match=r"recipe\.yaml:3: run\.dir: is empty"):
        load_recipe(
            write(tmp_path, SOUND.replace("${vars.root}/rto", "").replace("vars: {root: runs/x}\n", ""))
        )


def test_nothing_behind_a_key_is_no_null(tmp_path: Path) -> None:
    recipe = write(tmp_path, SOUND + "algorithm: {dpo_clip: 0.02}\n")
    given = ["run.steps=", "algorithm.dpo_clip= ", "optimizer.max_grad_norm="]
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, given)
    for key in ("run.steps", "algorithm.dpo_clip", "optimizer.max_grad_norm"):
        assert f"command line: {key}: is empty; give a value, or null for none" in str(caught.value)
    config = load_recipe(recipe, [f"{one.strip()}null" for one in given])
    assert (config.run.steps, config.algorithm.dpo_clip, config.optimizer.max_grad_norm) == (None,) * 3


def test_an_override_may_name_other_keys_as_a_recipe_may(tmp_path: Path) -> None:
    recipe = write(tmp_path, SOUND)
    config = load_recipe(recipe, ["run.dir=/r/${vars.root}/${stage} #2", "vars.root=[a"])
    assert str(config.run.dir) == "/r/[a/rto #2"
    assert str(load_recipe(recipe, [r"run.dir=/r/\${vars.root}"]).run.dir) == "/r/${vars.root}"
    with pytest.raises(
        RecipeError, match=r"run\.dir: found \$\{oc\.env:HOME\}; only names of keys may stand in"
    ):
        load_recipe(recipe, ["run.dir=${oc.env:HOME}"])
    with pytest.raises(RecipeError, match=r"vars\.rot"):
        load_recipe(recipe, ["run.dir=${vars.rot}"])


@pytest.mark.parametrize(
    ("line", "override", "value"),
    [
        ("run: {dir: x, steps: '${vars.n}'}", "vars.n=4", 4),
        ("run: {dir: x, steps: '${vars.n}'}", "vars.n=null", None),
        ("optimizer: {lr: 1.0, betas: '${vars.n}'}", "vars.n=[0.5, 0.6]", (0.5, 0.6)),
        ("optimizer: {lr: '${vars.n}'}", "vars.n=1e-6", 1e-6),
        ("batch: {packed: '${vars.n}'}", "vars.n=off", False),
        ("rollout: {servers: '${vars.n}'}", "vars.n=[http://a:1, http://b:2]", ("http://a:1", "http://b:2")),
        ("models: {policy: '${vars.n}', reward: r, dpo: d}", "vars.n=1e5", Path("1e5")),
    ],
)
def test_a_variable_of_the_command_line_is_what_its_key_needs(
    line: str, override: str, value: object, tmp_path: Path
) -> None:
    section = line.partition(":")[0]
    others = [one for one in SOUND.splitlines() if not one.startswith((f"{section}:", "vars:"))]
    config = load_recipe(write(tmp_path, "\n".join([*others, "vars: {n: 1}", line]).replace(
        "${vars.root}/rto", "runs/x")), [override])  # fmt: skip
    assert value in [found for _, found in config.model_dump()[section].items()]


def test_the_stage_may_be_named_by_a_variable_of_the_command_line(tmp_path: Path) -> None:
    text = SOUND.replace("stage: rto", "stage: ${vars.method}").replace("{root: ", "{method: ppo, root: ")
    config = load_recipe(write(tmp_path, text), ["vars.method=rto", "run.dir=/x/a #1"])
    assert (config.stage, str(config.run.dir)) == ("rto", "/x/a #1")
    assert str(load_recipe(write(tmp_path, SOUND), ["stage=rto", "run.dir=/x/a #1"]).run.dir) == "/x/a #1"


def test_an_entry_of_a_list_is_named_by_its_number(tmp_path: Path) -> None:
    recipe = write(
        tmp_path, SOUND + "rewards: [{kind: model}, {kind: overlong, buffer_tokens: 4}]\nsampling: {}\n"
    )
    config = load_recipe(recipe, ["rewards.0.weight=0.5", "rewards.1.name=long"])
    assert isinstance(config, ActorCriticStage)
    assert [(one.name, one.weight) for one in config.rewards] == [("model", 0.5), ("long", 1.0)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.7.weight=2", "command line: rewards.7.weight: names no entry of a list"),
        ("rewards.model.weight=2", "command line: rewards.model.weight: names no entry of a list"),
        ("rewards={kind: model}", "command line: rewards: found {'kind': 'model'}"),
        ("optimizer=[1e-6]", "command line: optimizer: found [1e-06]"),
        (
            "optimzer.lr=3",
            "command line: optimzer: found {'lr': 3}; there is no such key; did you mean optimizer?",
        ),
        ("run.seed=99999999999999999999", "run.seed: found 99999999999999999999; must be less than or equal"),
        ("run..dir=3", "'run..dir=3': an override is written key=value with a dotted key"),
    ],
)
def test_a_key_that_the_recipe_cannot_take_is_the_command_lines_mistake(
    override: str, message: str, tmp_path: Path
) -> None:
    recipe = write(tmp_path, SOUND + "rewards: [{kind: model}]\n")
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(recipe, [override])


def test_a_variable_whose_users_were_overridden_is_no_mistake(tmp_path: Path) -> None:
    recipe = write(tmp_path, SOUND)
    assert str(load_recipe(recipe, ["run.dir=/x"]).run.dir) == "/x"
    nested = SOUND.replace("{root: runs/x}", "{a: {b: runs/x}}").replace("vars.root", "vars.a.b")
    assert load_recipe(write(tmp_path, nested)).run.dir == Path.cwd() / "runs/x/rto"
    with pytest.raises(RecipeError, match=r"recipe\.yaml:3: vars\.other: no key uses"):
        load_recipe(write(tmp_path, SOUND.replace("{root: ", "{other: 1, root: ")), ["run.dir=/x"])
    with pytest.raises(RecipeError, match=r"command line: vars\.extra: no key uses"):
        load_recipe(write(tmp_path, SOUND), ["run.dir=/x", "vars.extra=1"])


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_text_is_told_by_its_type(stage: str) -> None:
    """By hand: pydantic's JSON schema calls them strings; lists, numbers and sections are none."""
    from rto_megatron.config.overrides import text_keys

    expected = set()
    tree = STAGES[stage].model_json_schema()

    def types(node: dict[str, object]) -> set[object]:
        choices = node.get("anyOf")
        if not isinstance(choices, list):
            items = node.get("items")
            return {"numbers" if items == {"type": "integer"} else node.get("type")}
        return {kind for one in choices for kind in types(one)}

    def look(node: dict[str, object], prefix: str) -> None:
        properties = node.get("properties")
        assert isinstance(properties, dict)
        for name, field in properties.items():
            whole = tree["$defs"][field["$ref"].rpartition("/")[2]] if "$ref" in field else field
            if "properties" in whole:
                look(whole, f"{prefix}{name}.")
            elif types(whole) - {"null"} in ({"string"}, {"string", "array"}):  # a source of data, or several
                expected.add(f"{prefix}{name}")

    look(tree, "")
    assert set(text_keys(STAGES[stage])) == expected
    assert {"stage", "run.dir", "models.policy"} <= expected


def test_a_recipe_that_is_not_there_is_answered_with_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("rto.yaml", "rto"):
        with pytest.raises(
            RecipeError, match=r"no such recipe.*recipes of that name: .*/launchers/recipes/.*/rto\.yaml"
        ):
            load_recipe(Path(given))
    with pytest.raises(
        RecipeError, match=r"recipes of that name: \S*/launchers/recipes/quickstart/sft\.yaml$"
    ):
        load_recipe(Path("quickstart/sft"))
    with pytest.raises(RecipeError, match=r"recipes of that name: .*/reward_model\.yaml"):
        load_recipe(Path("reward-model.yaml"))
    with pytest.raises(RecipeError, match=r"recipes are in .*/launchers/recipes/\*: .*quickstart"):
        load_recipe(Path("qqqqqq.yaml"))
    write(tmp_path, SOUND)
    with pytest.raises(
        RecipeError, match=r"is a folder; give the path of a YAML file; it holds recipe\.yaml"
    ):
        load_recipe(Path())


def test_an_override_of_micro_batches_by_tokens_or_by_number_unsets_the_other(tmp_path: Path) -> None:
    by_number = write(
        tmp_path, SOUND.replace("{root", "{micro: 4, root") + "batch: {micro: '${vars.micro}'}\n"
    )
    assert load_recipe(by_number).batch.micro == 4
    for given in (["batch.tokens=4096"], ["batch={tokens: 4096}"], ["batch.tokens=4096", "batch.micro=null"]):
        batch = load_recipe(by_number, given).batch
        assert (batch.micro, batch.tokens) == (None, 4096)
    (tmp_path / "tokens").mkdir()
    by_tokens = write(tmp_path / "tokens", dump(load_recipe(by_number, ["batch.tokens=4096"])))
    assert load_recipe(by_tokens).batch.tokens == 4096
    batch = load_recipe(by_tokens, ["batch.micro=2"]).batch
    assert (batch.micro, batch.tokens) == (2, None)
    for given in (["batch.tokens=4096", "batch.micro=2"], ["batch={tokens: 4096, micro: 2}"]):
        with pytest.raises(RecipeError, match=r"batch\.micro=2 and batch\.tokens=4096 exclude each other"):
            load_recipe(by_number, given)
    assert load_recipe(by_tokens, ["batch.tokens=null"]).batch.micro == 1


def test_a_variable_that_there_is_not_is_named_with_its_place_and_those_that_there_are(
    tmp_path: Path,
) -> None:
    recipe = write(tmp_path, SOUND)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, ["models.policy=${vars.nope}/x", "models.dpo=${vars.rot}"])
    said = str(caught.value)
    assert "command line: models.policy: found ${vars.nope}; there is no key vars.nope; vars has root" in said
    assert (
        "command line: models.dpo: found ${vars.rot}; there is no key vars.rot; did you mean vars.root?"
        in said
    )
    assert "object_type" not in said
    with pytest.raises(
        RecipeError, match=r"recipe\.yaml:3: run\.dir: found \$\{vars\.root\}; there is no key vars"
    ):
        load_recipe(write(tmp_path, SOUND.replace("vars: {root: runs/x}\n", "")))


def test_null_where_a_path_must_stand_is_answered_in_words(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"models\.policy: found None; must be a path$"):
        load_recipe(write(tmp_path, SOUND), ["models.policy=null"])
