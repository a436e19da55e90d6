"""Verifiers of kept libraries, in the process of a reward function; skipped where they are not installed."""

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.config.reward_code import missing_packages
from rto_megatron.config.rewards import MathVerifySource, ReasoningGymSource
from rto_megatron.errors import UserError
from rto_megatron.rewards.function_reward import Called, FunctionRater
from rto_megatron.rewards.raters import rater_of
from rto_megatron.rewards.sample import Json, Sample


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason="pip install -r requirements/verifiers.txt"
    )


def answered(response: str, columns: dict[str, Json]) -> Sample:
    return Sample("p0", "say", response, (1,), (5, 2), ("a", ""), "stop", columns)


def rater(verifier: str, **options: Json) -> FunctionRater:
    return FunctionRater(
        Called("rewards.it", f"rto_megatron.rewards.{verifier}:score", "response", 60.0, options)
    )


@needs("math_verify")
def test_math_verify_compares_as_mathematics() -> None:
    cases = [
        ("so we get \\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("The answer is $x + 1$.", "1 + x", 1.0),
        ("The answer is 7", "8", 0.0),
        ("I do not know", "\\frac{1}{2}", 0.0),
        ("It is 0.5", "\\frac{1}{2}", 1.0),
    ]
    one = rater("verify_math", answer="gold")
    samples = [answered(response, {"gold": right}) for response, right, _ in cases]
    assert one.rate(samples) == [score for _, _, score in cases]
    with pytest.raises(
        UserError, match=r"(?s)failed on 1 sample: p0.*has no column 'gold', only \['answer'\]"
    ):
        one.rate([answered("7", {"answer": "7"})])


@needs("reasoning_gym")
def test_reasoning_gym_writes_prompts_and_scores_answers_to_them(tmp_path: Path) -> None:
    import reasoning_gym

    from rto_megatron.rewards import verify_gym

    file = tmp_path / "prompts.jsonl"
    chosen = ["--out", str(file), "--size", "4", "--seed", "3", "--options", '{"max_terms": 3}']
    done = CliRunner().invoke(app, ["reasoning-gym", "chain_sum", *chosen], catch_exceptions=False)
    assert done.exit_code == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    theirs = reasoning_gym.create_dataset("chain_sum", size=4, seed=3, max_terms=3)
    assert [row["prompt"] for row in rows] == [entry["question"] for entry in theirs]
    assert len({row["prompt_id"] for row in rows}) == 4
    guesses = ["0", "-17", " " + rows[2]["answer"], rows[3]["answer"] + "1"]
    samples = [answered(guess, row) for guess, row in zip(guesses, rows, strict=True)]
    wanted = [theirs.score_answer(guess.strip(), entry) for guess, entry in zip(guesses, theirs, strict=True)]
    # In this process: the library takes seconds to import.
    assert [verify_gym.score(one, answer_tag=None) for one in samples] == wanted and wanted[2] == 1.0
    tagged = [answered(f"so <answer>{rows[0]['answer']}</answer>", rows[0]), answered("so 4", rows[1])]
    assert [verify_gym.score(one, answer_tag="answer") for one in tagged] == [1.0, 0.0]
    for arguments, expected in (
        (["no_task", "--out", str(file)], "reasoning-gym has no task 'no_task'"),
        (["chain_sum", "--out", str(file), "--options", '{"nothing": 1}'], "does not take these options"),
        (["chain_sum", "--out", str(file), "--options", "["], "is not JSON"),
    ):
        with pytest.raises(UserError, match=expected):
            CliRunner().invoke(app, ["reasoning-gym", *arguments], catch_exceptions=False)


def test_the_tag_that_a_source_names_is_where_its_verifier_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of its name stands for the library, which not every environment has."""
    package = tmp_path / "reasoning_gym"
    package.mkdir()
    (package / "__init__.py").write_text(
        "def get_score_answer_fn(task):\n    return lambda answer, entry: float(answer == entry['answer'])\n"
    )
    (package / "utils.py").write_text(
        "import re\n\n\ndef extract_answer(response, tag_name):\n"
        "    found = re.search(f'<{tag_name}>(.*)</{tag_name}>', response)\n    return found and found[1]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row: dict[str, Json] = {"reasoning_gym": {"task": "sums", "entry": {"answer": "7"}}}
    samples = [answered("so <last>7</last>", row), answered("7", row)]
    for tag, expected in (("last", [1.0, 0.0]), (None, [0.0, 1.0])):
        assert rater_of(ReasoningGymSource(kind="reasoning_gym", answer_tag=tag)).rate(samples) == expected


def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr("sys.path_importer_cache", {})
    sources = (MathVerifySource(kind="math_verify"), ReasoningGymSource(kind="reasoning_gym", name="gym"))
    first, second = missing_packages(sources)
    assert first.startswith("rewards.math_verify: the package math-verify is not installed")
    assert "rewards.gym" in second and "pip install 'rto-megatron[reasoning-gym]'" in second
