"""The section `rewards`: mistakes are told with their place, and code is looked at and never run."""

import hashlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.config.checks import find_problems
from rto_megatron.config.load import dump, load_recipe
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.errors import UserError

RECIPE = Path(__file__).parents[2] / "launchers/recipes/llama3_8b/rto.yaml"
CODE = "raise RuntimeError('this file was run')\n\n\ndef score(sample):\n    return 1\n\n\nother = score\n"


def grpo(folder: Path, rewards: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        "stage: grpo\nrun: {dir: r}\nmodels: {policy: p}\ndata: {train: a/b:train}\noptimizer: {lr: 1.0e-6}\n"
        f"rewards:\n{rewards}"
    )
    return path


def refused(folder: Path, rewards: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(grpo(folder, rewards))
    return str(caught.value)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        (
            "- {kind: functon}",
            "recipe.yaml:7: rewards.0.kind: found 'functon'; must be one of model, function",
        ),
        ("- {kind: functon}", "did you mean function?"),
        ("- {name: x}", "rewards.0.kind: found None; must be one of"),
        ("- 3", "rewards.0: found 3; expected a section with a key `kind`"),
        (
            "- kind: overlong\n  buffer_tokens: 0",
            ":8: rewards.0.buffer_tokens: found 0; must be greater than",
        ),
        ("- {kind: function}", "rewards.0.function: is missing; file.py:name or package.module:name"),
        (
            "- {kind: model}\n- {kind: model, weigt: 2}",
            ":8: rewards.1.weigt: found 2; kind model has no such key",
        ),
        ("- {kind: model, weigt: 2}", "did you mean rewards.0.weight?"),
        ("- {kind: service, url: 'ftp://x'}", "an address is written http://host:port/path"),
        ("- {kind: service, url: 'http://me:secret@x/'}", "holds a name or password before an @"),
        ("- {kind: service, url: 'http://x/', token_env: A, token_file: b}", "both give a token; remove one"),
        (
            "- {kind: service, url: 'http://x/', protocol: vllm, pays: tokens}",
            "protocol=vllm gives one number",
        ),
        (
            "- {kind: function, function: 'a.py:f', pays: spans, normalize: batch}",
            "this source pays spans; remove it, or pay tokens",
        ),
        ("- {kind: function, function: a.py}", "a function is written file.py:name"),
        ("- {kind: model, name: 'a/b'}", "a name is made of a-z, 0-9, _ and -"),
        ("- {kind: model, name: '${oc.env:HOME}'}", "only names of keys may stand in ${...}"),
    ],
)
def test_mistakes_in_the_list_are_told_with_place_and_remedy(
    rewards: str, expected: str, tmp_path: Path
) -> None:
    assert expected in refused(tmp_path, rewards)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rewards=[{kind: model},{kind: model, name: b}]"], "2 sources of kind model"),
        (["rewards=[{kind: overlong, buffer_tokens: 9}]"], "no source in `rewards` is of kind model"),
        (["models.reward=null", "rewards=[{kind: model}]"], "models.reward is missing"),
        (["models.reward=null"], "or list sources of other kinds in `rewards`"),
        (
            ["rewards=[{kind: model},{kind: math_verify},{kind: math_verify}]"],
            "2 sources named 'math_verify'",
        ),
        (["rewards=[{kind: model, normalize: group}]"], "normalize=group has nothing to compare with"),
        (
            ["rewards=[{kind: model},{kind: overlong, buffer_tokens: 1025}]"],
            "the shortest response would be punished",
        ),
        (
            ["rewards=[{kind: model, overlong_buffer_tokens: 1025}]"],
            "rewards.model.overlong_buffer_tokens=1025 is above sampling.max_response_tokens=1024",
        ),
        (
            ["rewards=[{kind: model},{kind: math_verify, timeout_s: 50}]", "run.collective_timeout_s=40"],
            "may take 50 s",
        ),
        (
            [
                "rewards=[{kind: model},{kind: math_verify, timeout_s: 30},{kind: overlong, buffer_tokens: 8},"
                "{kind: math_verify, name: again, timeout_s: 10}]",
                "run.collective_timeout_s=40",
            ],
            "may take 40 s",
        ),
    ],
)
def test_sources_that_do_not_fit_together_are_named(overrides: list[str], expected: str) -> None:
    (problem,) = find_problems(load_recipe(RECIPE, overrides), 4, {})
    assert expected in problem


@pytest.mark.parametrize(
    "overrides",
    [
        ["rewards=[{kind: model},{kind: overlong, buffer_tokens: 1024}]"],
        ["rewards=[{kind: model, overlong_buffer_tokens: 1024}]"],
        ["rewards=[{kind: model},{kind: math_verify, timeout_s: 39}]", "run.collective_timeout_s=40"],
        ["rewards=[{kind: model},{kind: math_verify, timeout_s: 50}]", "run.collective_timeout_s=null"],
        ["rewards=[{kind: model, normalize: group}]", "algorithm.samples_per_prompt=2"],
    ],
)
def test_sources_at_the_edge_of_what_fits_are_taken(overrides: list[str]) -> None:
    assert find_problems(load_recipe(RECIPE, overrides), 4, {}) == []


def test_code_is_found_and_its_digest_kept_and_none_of_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "mine/inner"
    package.mkdir(parents=True)
    for path in (
        tmp_path / "rule.py",
        tmp_path / "mine/__init__.py",
        package / "__init__.py",
        package / "rule.py",
    ):
        path.write_text(CODE)
    digest = hashlib.sha256(CODE.encode()).hexdigest()
    path = grpo(
        tmp_path,
        "- {kind: function, function: 'rule.py:score', name: file}\n"
        "- {kind: function, function: 'mine.inner.rule:other', name: module}\n",
    )
    config = load_recipe(path)
    assert isinstance(config, ReinforcementStage)
    assert [one.model_dump()["sha256"] for one in config.rewards] == [digest] * 2
    assert config.rewards[0].model_dump()["function"] == f"{tmp_path}/rule.py:score"
    (tmp_path / "saved.yaml").write_text(dump(config))
    assert load_recipe(tmp_path / "saved.yaml") == config
    # Neither does `rto check`, nor the doctor, nor a launch that ends before its first process.
    for command in ("check", "doctor", "launch"):
        shown = CliRunner().invoke(app, [command, str(path)])
        told = " ".join(shown.output.split())
        assert "this file was run" not in told
        assert digest[:16] in told, command
    (tmp_path / "rule.py").write_text(CODE + "# other\n")
    with pytest.raises(
        UserError, match=rf"rewards.file: .*rule.py has sha256 .*expects {digest}.*once you have read"
    ):
        load_recipe(tmp_path / "saved.yaml")


@pytest.mark.parametrize(
    ("target", "code", "expected"),
    [
        ("absent.py:f", None, "cannot be read (No such file or directory)"),
        ("rule.py:scor", CODE, "does not define scor; did you mean score?"),
        ("rule.py:f", "def (", "is not Python code"),
        ("no.such:f", None, "there is no module no.such"),
        ("json:nothing", None, "does not define nothing"),
        ("math:floor", None, "module math has no Python file"),
    ],
)
def test_code_that_is_not_there_is_told_by_check(
    target: str, code: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if code is not None:
        (tmp_path / "rule.py").write_text(code)
    assert expected in refused(tmp_path, f"- {{kind: function, function: '{target}'}}")
