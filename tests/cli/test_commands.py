"""The command line: help for everything, one clear message for a user's mistake, no traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.errors import RecipeError

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "launchers" / "recipes"
CONVERSIONS = ("convert hf-to-megatron", "convert megatron-to-hf", "convert gguf-to-hf", "convert verify")
COMMANDS = (
    "train",
    "launch",
    "convert",
    "check",
    "synthesize",
    "tokenizer",
    "pool",
    "slurm",
    "node",
    "address",
    "report",
    "rollouts",
    "view",
    "generate",
    "judge",
    "score",
    "quantize",
)


def rto(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rto_megatron.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)


@pytest.mark.parametrize("command", [*COMMANDS, *CONVERSIONS, "after-attempt"])
def test_every_command_and_option_explains_itself(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    described = [line.strip("│ ") for line in shown.output.splitlines() if "│" in line and "--" in line]
    assert described, shown.output
    assert all(len(line.split()) > 3 for line in described), shown.output


def test_help_lists_all_commands_without_loading_torch() -> None:
    script = "import sys, rto_megatron.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, check=False).returncode == 0
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert all(command in shown.output for command in COMMANDS)


def test_mistakes_give_messages_with_status_2_and_no_traceback(tmp_path: Path) -> None:
    shown = rto("train", str(RECIPES / "quickstart" / "sft.yaml"), "run.stepz=3", "optimizer.lr=fast")
    assert shown.returncode == 2
    assert "run.stepz: found 3; there is no such key; did you mean run.steps?" in shown.stderr
    assert "optimizer.lr: found 'fast'" in shown.stderr
    assert "Traceback" not in shown.stderr + shown.stdout


@pytest.mark.parametrize("stage", ["ppo", "rto", "evaluate"])
def test_stage_that_samples_asks_for_its_pool_before_anything_is_loaded(stage: str) -> None:
    with pytest.raises(RecipeError, match=r"rollout\.servers is empty"):
        CliRunner().invoke(
            app, ["train", str(RECIPES / "quickstart" / f"{stage}.yaml")], catch_exceptions=False
        )


def test_failing_ranks_end_a_launch_with_one_message() -> None:
    shown = rto("launch", str(RECIPES / "quickstart" / "sft.yaml"), "models.policy=/nowhere", "--ranks", "2")
    assert shown.returncode == 2
    assert shown.stderr.count("error") == 1, shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize(("command", "hidden"), [("tokenizer", 65), ("synthesize", 33)])
def test_a_hidden_size_without_equal_heads_is_refused_before_anything_is_written(
    command: str, hidden: int, tmp_path: Path
) -> None:
    folder = tmp_path / "new"
    where = ["texts.jsonl", "--out", str(folder)] if command == "tokenizer" else [str(folder)]
    with pytest.raises(
        RecipeError, match=rf"--hidden {hidden}: expected a multiple of \d+.*; take {hidden - 1} or"
    ):
        CliRunner().invoke(app, [command, *where, "--hidden", str(hidden)], catch_exceptions=False)
    assert not folder.exists()


def test_the_model_of_a_tokenizer_shares_keys_evenly_among_its_heads(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "red fox number {number}"}}\n' for number in range(200)))
    given = ["tokenizer", str(texts), "--out", str(tmp_path / "m"), "--vocab", "300", "--hidden", "160"]
    shown = CliRunner().invoke(app, given, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    written = json.loads((tmp_path / "m/config.json").read_text())
    assert written["num_attention_heads"] == 5
    assert 5 % written["num_key_value_heads"] == 0


WRITERS = {
    "synthesize TAKEN": "folder",
    "tokenizer absent.jsonl --out TAKEN": "folder",
    "data pairs absent.jsonl --prompts absent.jsonl --out TAKEN": "file",
    "reasoning-gym chain_sum --out TAKEN": "file",
}


@pytest.mark.parametrize("command", WRITERS)
def test_what_is_there_is_not_written_over(command: str, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    mine = taken if WRITERS[command] == "file" else taken / "prompts_train.jsonl"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(RecipeError, match=r"taken exists already.*name another one, or remove it first"):
        CliRunner().invoke(app, command.replace("TAKEN", str(taken)).split(), catch_exceptions=False)
    assert mine.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


def test_a_synthesized_task_appears_whole(tmp_path: Path) -> None:
    """What was stopped half-way stands beside it, and is made again."""
    left = tmp_path / ".partial_task"
    left.mkdir()
    (left / "prompts_train.jsonl").write_text("half a row")
    shown = CliRunner().invoke(app, ["synthesize", str(tmp_path / "task")], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert [path.name for path in tmp_path.iterdir()] == ["task"]
    rows = (tmp_path / "task/prompts_train.jsonl").read_text().splitlines()
    assert len(rows) == 2000 and json.loads(rows[0])["context_messages"]


@pytest.mark.parametrize("command", ["rules", "synthesize", "tokenizer"])
@pytest.mark.parametrize("below", ["", "new"])
def test_a_file_where_a_folder_is_to_be_written_is_refused(command: str, below: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    folder = str(tmp_path / "taken" / below)
    where = ["texts.jsonl", "--out", folder] if command == "tokenizer" else [folder]
    with pytest.raises(RecipeError, match=r"taken is a file; expected the name of a folder"):
        CliRunner().invoke(app, [command, *where], catch_exceptions=False)
