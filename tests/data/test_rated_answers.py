"""`rto data rate`: a recipe's rewards on answers that are there, before anything is trained."""

import json
from pathlib import Path

import pytest
from trainer.tiny_runs import write_files, write_rows
from typer.testing import CliRunner, Result

from rto_megatron.cli.main import app
from rto_megatron.config.load import load_recipe
from rto_megatron.config.schema import EvaluateStage
from rto_megatron.data.eos import own_eos
from rto_megatron.data.rated_answers import rate_answers
from rto_megatron.data.tokenizer import load_tokenizer

RECIPE = Path(__file__).parents[2] / "launchers/recipes/quickstart/evaluate.yaml"
REWARDS = '''
def seen(sample):
    """Every part that a run shows of a response."""
    assert sample.prompt_ids and sample.prompt.endswith("<|assistant|>"), sample.prompt
    return 100 * sample.columns["gold"] + len(sample.response.split()) + 0.5 * (sample.finish_reason == "stop")


def tokens(sample):
    return [1.0 + (token == "</s>") for token in sample.tokens]


def broken(sample):
    return float("nan") if sample.prompt_id == "b" else 1.0
'''


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """Answers of 3 and of 30 words, where a run would cut the second."""
    write_files(tmp_path)
    (tmp_path / "mine.py").write_text(REWARDS)
    rows = [
        {"prompt_id": "a", "prompt": "red fox", "response": "blue dog cat", "gold": 1},
        {"prompt_id": "b", "prompt": "green", "response": "cat " * 30, "gold": 2},
    ]
    write_rows(tmp_path / "answers.jsonl", rows)
    return tmp_path


def keys(folder: Path, *sources: str) -> list[str]:
    return [
        f"models.policy={folder / 'models/policy'}",
        "sampling.max_response_tokens=20",
        "data.max_prompt_tokens=12",
        f"rewards=[{', '.join(sources)}]",
    ]


def function(folder: Path, name: str, pays: str) -> str:
    return f"{{kind: function, name: {name}, function: {folder / 'mine.py'}:{name}, pays: {pays}}}"


def rate(folder: Path, *sources: str, overlong: str = "error") -> Result:
    given = [str(RECIPE), *keys(folder, *sources), "--answers", str(folder / "answers.jsonl")]
    given.append(f"data.overlong={overlong}")
    return CliRunner().invoke(app, ["data", "rate", *given])


def test_sources_see_each_answer_as_in_a_run(answers: Path) -> None:
    sources = [function(answers, "seen", "response"), function(answers, "tokens", "tokens")]
    config = load_recipe(RECIPE, keys(answers, *sources))
    assert isinstance(config, EvaluateStage)
    tokenizer = load_tokenizer(answers / "models/policy")
    rated, report = rate_answers(config, tokenizer, own_eos(tokenizer), str(answers / "answers.jsonl"), 10)
    first, second = rated
    assert (report.rows, report.kept) == (2, 2)
    assert first.given == {"seen": 103.5, "tokens": 5.0}  # three words, and an end that counts twice
    assert (len(second.sample.response_ids), second.sample.finish_reason) == (20, "length")
    assert second.given == {"seen": 220.0, "tokens": 20.0}


def test_spread_and_extremes_are_printed_before_anything_is_trained(answers: Path) -> None:
    shown = rate(answers, function(answers, "seen", "response"), "{kind: overlong, buffer_tokens: 4}")
    assert shown.exit_code == 0, shown.output
    assert "rewards.seen runs" in shown.output and "with your rights" in shown.output
    spread = next(line for line in shown.output.splitlines() if line.startswith("│ seen"))
    assert spread.split()[3::2] == ["+161.750", "+103.500", "+220.000"]
    assert "blue dog cat" in shown.output


def test_rewards_that_need_a_run_and_stages_that_pay_none_are_refused(answers: Path) -> None:
    refused = rate(answers, "{kind: overlong, buffer_tokens: 4}")
    assert "there is no function, service or verifier among its sources" in str(refused.exception)
    sft = [str(RECIPE.with_name("sft.yaml")), "--answers", str(answers / "answers.jsonl")]
    refused = CliRunner().invoke(app, ["data", "rate", *sft])
    assert "stage sft pays no rewards" in str(refused.exception)


def test_a_reward_that_is_no_number_is_told_with_the_answers_that_got_it(answers: Path) -> None:
    refused = rate(answers, function(answers, "broken", "response"))
    told = "rewards.broken: gave a reward that is NaN or infinite to 1 sample: b, of 2;"
    assert told in str(refused.exception)


def test_answers_that_were_not_rated_are_told(answers: Path) -> None:
    long = {"prompt_id": "c", "prompt": "red " * 40, "response": "blue", "gold": 3}
    with (answers / "answers.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    shown = rate(answers, function(answers, "seen", "response"), overlong="drop")
    assert shown.exit_code == 0, shown.output
    assert "3 rows read, 2 kept, 1 dropped" in " ".join(shown.output.split())
