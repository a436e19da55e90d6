"""`rto data preview`: what a newcomer sees of the data before anything is trained."""

from pathlib import Path

import pytest
from cli.test_check_data import RECIPES, _pair, _row
from trainer.tiny_runs import write_files, write_rows
from typer.testing import CliRunner, Result

from rto_megatron.cli.main import app


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


def preview(policy: Path, stage: str, data: Path, *more: str) -> Result:
    given = [f"models.policy={policy}", f"data.train={data}"]
    if stage in ("sft", "dpo", "kto"):
        given += ["data.eval=null", "data.eval_samples=null"]
    return CliRunner().invoke(app, ["data", "preview", str(RECIPES / f"{stage}.yaml"), *given, *more])


def test_learnt_tokens_lengths_and_cuts_are_shown(files: Path, tmp_path: Path) -> None:
    talk = [*_row("red fox", "blue dog")["messages"], *_row("green", "cat sun")["messages"]]  # type: ignore[misc]
    write_rows(tmp_path / "sft.jsonl", [{"messages": talk}, _row("red fox", "cat " * 60)])
    shown = preview(files / "models/policy", "sft", tmp_path / "sft.jsonl", "data.loss_on=all")
    assert shown.exit_code == 0, shown.output
    assert (
        "<s><|user|> red fox<|assistant|>⟦ blue dog</s>⟧<|user|> green<|assistant|>⟦ cat sun</s>⟧"
        in shown.output
    )
    assert "2 rows read, 2 kept, 1 truncated answers" in shown.output
    assert "2 sequences, " in shown.output and "the longest 64" in shown.output
    last = preview(files / "models/policy", "sft", tmp_path / "sft.jsonl", "--examples", "1").output
    assert "<s><|user|> red fox<|assistant|> blue dog</s><|user|> green<|assistant|>⟦ cat sun</s>⟧" in last


def test_pairs_verdicts_and_prompts_are_shown(files: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [_pair("red fox", "blue", "dog"), _pair("green", "blue", "dog")])
    for stage, names in (("dpo", ("chosen", "rejected")), ("kto", ("desirable", "undesirable"))):
        output = preview(files / "models/policy", stage, tmp_path / "pairs.jsonl").output
        for name, answer in zip(names, ("blue", "dog"), strict=True):
            assert f": {name}, " in output and f"<|assistant|>⟦ {answer}</s>⟧" in output
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "red fox"}])
    output = preview(files / "models/policy", "rto", tmp_path / "prompts.jsonl").output
    assert ": prompt, " in output and "<s><|user|> red fox<|assistant|>" in output and "⟦" not in output


def test_what_cannot_be_read_is_said_at_once(files: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "sft.jsonl", [{"messages": []}])
    sources = f"[{tmp_path / 'sft.jsonl'},{tmp_path / 'gone.jsonl'}]"
    refused = preview(files / "models/policy", "sft", Path(sources))
    assert "2 of its sources cannot be read" in str(refused.exception)
    assert "sft.jsonl:1" in str(refused.exception) and "gone.jsonl" in str(refused.exception)
    absent = preview(tmp_path / "policy", "sft", tmp_path / "sft.jsonl")
    assert "there is no tokenizer on this machine" in str(absent.exception)
