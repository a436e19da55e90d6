"""`rto check` and `rto doctor` say of local data what the stage would say of it, up to the 1000th row."""

from pathlib import Path

import pytest
from trainer.tiny_runs import write_files, write_rows
from typer.testing import CliRunner, Result

from rto_megatron.cli.main import app
from rto_megatron.data.look import NUM_ROWS

RECIPES = Path(__file__).parents[2] / "launchers" / "recipes" / "quickstart"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


def _check(files: Path, stage: str, data: Path, *overrides: str) -> Result:
    policy = f"models.policy={files / 'models/policy'}"
    given = [policy, f"data.train={data}", "data.eval=null", "data.eval_samples=null", *overrides]
    if stage in ("ppo", "rto"):
        given = [policy, f"data.train={data}", *overrides]
    return CliRunner().invoke(app, ["check", str(RECIPES / f"{stage}.yaml"), *given])


def _found(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return " ".join(result.output.replace("│", " ").split())


def _row(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _pair(question: str, better: str, worse: str) -> dict[str, object]:
    return {
        "prompt": question,
        "chosen": _row(question, better)["messages"],
        "rejected": _row(question, worse)["messages"],
    }


def test_a_cut_demonstration_is_counted_and_not_closed(files: Path, tmp_path: Path) -> None:
    data = tmp_path / "sft.jsonl"
    write_rows(data, [_row("red fox", "blue dog"), _row("red fox", "green cat " * 60)])
    found = _found(_check(files, "sft", data))
    assert "2 rows read, 2 kept, 1 truncated answers" in found
    assert "closed" not in found


def test_weights_that_are_there_and_not_read_are_said(files: Path, tmp_path: Path) -> None:
    data = tmp_path / "sft.jsonl"
    write_rows(data, [_row("red fox", "blue dog")])
    said = "warning: models.random_init=true: weights are drawn from run.seed"
    assert said in _found(_check(files, "sft", data))
    assert said not in _found(_check(files, "sft", data, "models.random_init=false"))
    (tmp_path / "models/policy").mkdir(parents=True)
    assert said not in _found(_check(tmp_path, "sft", data))


def test_a_cut_answer_of_a_pair_is_closed(files: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    write_rows(data, [_pair("red fox", "blue " * 99, "dog")] * 3)
    found = _found(_check(files, "dpo", data))
    assert "3 rows read, 3 kept, 3 truncated answers, 3 truncated answers closed" in found


def test_rows_of_one_prompt_do_not_speak_against_those_behind_them(files: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [_pair("red fox", "blue dog", "dog")] * NUM_ROWS
    write_rows(data, [*rows, _pair("green cat", "blue dog", "dog")])
    assert f"{NUM_ROWS} rows read, {NUM_ROWS} kept" in _found(_check(files, "kto", data))


def test_prompts_and_texts_beside_them_are_looked_at(files: Path, tmp_path: Path) -> None:
    prompts, texts = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    write_rows(prompts, [{"prompt": "red fox"}, {"prompt": "green cat " * 60}])
    write_rows(texts, [{"text": "rain snow"}] * 4)
    given = (f"data.pretrain={texts}", "algorithm.ptx_coef=1", "data.overlong=drop")
    found = _found(_check(files, "rto", prompts, *given))
    assert "2 rows read, 1 kept, 1 dropped" in found
    assert "4 rows read, 4 kept" in found


def test_held_out_prompts_of_a_stage_that_trains_are_looked_at(files: Path, tmp_path: Path) -> None:
    prompts, held_out = tmp_path / "prompts.jsonl", tmp_path / "held_out.jsonl"
    write_rows(prompts, [{"prompt": "red fox"}])
    write_rows(held_out, [{"prompt": "red fox"}, {"prompt": "green cat"}, {"prompt": "rain"}])
    assert f"{held_out}: 3 rows read, 3 kept" in _found(
        _check(files, "rto", prompts, f"data.eval={held_out}")
    )
    write_rows(held_out, [{"prompt": "red fox"}, {"question": "green cat"}])
    refused = _check(files, "rto", prompts, f"data.eval={held_out}")
    assert "data.eval" in str(refused.exception) and f"{held_out}:2" in str(refused.exception)
    gone = _found(_check(files, "rto", prompts, f"data.eval={tmp_path / 'gone.jsonl'}"))
    assert "gone.jsonl: not on this machine, not looked at" in gone


def test_a_pattern_that_matches_nothing_is_called_one(files: Path, tmp_path: Path) -> None:
    found = _found(_check(files, "sft", tmp_path / "nope" / "*.jsonl"))
    assert "nope/*.jsonl: a pattern that no file on this machine matches, not looked at" in found


def test_a_layout_of_other_examples_is_refused_wherever_the_data_are(files: Path, tmp_path: Path) -> None:
    for data in (tmp_path / "gone.jsonl", Path("owner/name:train")):
        refused = _check(files, "rto", data, "data.layout=messages")
        assert "data.layout=messages is no layout of prompts" in str(refused.exception)


def test_bad_rows_are_refused_all_at_once(files: Path, tmp_path: Path) -> None:
    data = tmp_path / "sft.jsonl"
    write_rows(data, [_row("red fox", "blue dog"), {"prompt": "red"}, {"question": "red"}])
    refused = _check(files, "sft", data)
    assert f"{data}:2" in str(refused.exception) and f"{data}:3" in str(refused.exception)
    assert "1 kept" in _found(_check(files, "sft", data, "data.bad_rows=drop"))


def test_the_layout_is_judged_where_the_tokenizer_is_not(tmp_path: Path) -> None:
    data = tmp_path / "sft.jsonl"
    write_rows(data, [_row("red fox", "blue dog")])
    found = _found(_check(tmp_path, "sft", data))
    assert "layout alone" in found and "1 rows read, 0 bad rows" in found


def test_a_budget_is_held_against_the_data(files: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    write_rows(data, [_pair("red fox", "blue", "dog"), _pair("red fox", "blue " * 30, "dog")])
    found = _found(_check(files, "dpo", data, "batch.tokens=40"))
    assert "1 of 2 take more than batch.tokens=40" in found
    result = _check(files, "dpo", data, "batch.tokens=4")
    assert result.exit_code != 0
    assert "batch.tokens=4 is below the longest prompt" in str(result.exception)


def test_layouts_and_parts_of_a_mixture_are_shown(files: Path, tmp_path: Path) -> None:
    chat, tasks = tmp_path / "chat.jsonl", tmp_path / "tasks.csv"
    write_rows(chat, [_row("red fox", "blue dog")] * 3)
    tasks.write_text("instruction,input,output\nred fox,,blue dog\n")
    given = (f"data.train=[{chat},{{source: {tasks}, weight: 2}}]",)
    found = _found(_check(files, "sft", chat, *given))
    assert f"{chat}: 3 rows read, 3 kept layout: messages (3 rows)" in found
    assert f"{tasks}: 1 rows read, 1 kept layout: alpaca (1 rows)" in found
    refused = _check(files, "sft", chat, "data.layout=texts_of_old")
    assert "data.layout" in str(refused.exception)
    refused = _check(files, "dpo", chat, "data.layout=alpaca")
    assert "data.layout=alpaca is no layout of pairs" in str(refused.exception) + refused.output


def test_a_verifier_whose_package_is_not_here_is_said(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "prompts.jsonl"
    write_rows(data, [{"prompt": "red fox", "answer": "1"}])
    monkeypatch.setattr("sys.path", [])
    found = _found(_check(files, "grpo", data, "rewards=[{kind: math_verify}]", "models.reward=null"))
    said = "warning: on this machine, rewards.math_verify: the package math-verify is not installed"
    assert said in found
