"""No secret leaves the place where it is kept, and no text of others is taken for a command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_ranks
from rich.console import Console
from trainer.tiny_runs import WORDS, configure, train, write_files

from rto_megatron.cli.main import _report
from rto_megatron.config.checks import find_problems
from rto_megatron.config.load import dump, load_recipe
from rto_megatron.config.run_folder import make_run_folder, open_folder_warning
from rto_megatron.errors import ModelFolderError, RecipeError, UserError
from rto_megatron.experiments.page import _html_table
from rto_megatron.generation.vllm.start.server import ServerOptions, start_server
from rto_megatron.reporting.evaluation import Estimate, Evaluation, final_table
from rto_megatron.reporting.progress import say

CANARY = "canary0123456789" * 4
HOSTILE = "\x1b[2J[bold]<script>alert(1)</script>\u202e\x9b31m"
SHOWN = "[2J[bold]<script>alert(1)</script>31m"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("secret_files")
    write_files(root)
    return root


@pytest.fixture
def token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pool's token; the same word stands in the environment as the tokens of others."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(variable, CANARY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "token"
    path.write_text(CANARY)
    path.chmod(0o600)
    return path


def artefacts_with_canary(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if CANARY.encode() in path.read_bytes()]


def test_a_run_leaves_no_token_in_its_folder_or_on_the_console(
    files: Path, token_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configure(
        "rto", files, tmp_path / "run", run__steps=1, run__samples_every=1, rollout__token_file=token_file
    )
    assert run_ranks(1, train, config) == [None]
    out, err = capfd.readouterr()
    assert "rto step 1" in out
    assert CANARY not in out + err
    assert {"config.yaml", "metrics.jsonl"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert artefacts_with_canary(tmp_path / "run") == []
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


def test_a_command_that_fails_at_the_pool_does_not_tell_the_token(
    files: Path, token_file: Path, tmp_path: Path
) -> None:
    config = configure("rto", files, tmp_path / "run", run__steps=1, rollout__token_file=token_file)
    (tmp_path / "recipe.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "rto_megatron.cli.main", "train", str(tmp_path / "recipe.yaml")]
    command.append("rollout.servers=[http://127.0.0.1:9]")
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0
    assert "127.0.0.1:9" in ended.stderr
    assert CANARY not in ended.stdout + ended.stderr
    assert artefacts_with_canary(tmp_path / "run") == []


def test_an_address_with_a_password_is_refused_and_not_repeated(files: Path, tmp_path: Path) -> None:
    for server in (f"http://me:{CANARY}@host:8000", f"me:{CANARY}@host:8000"):
        config = configure("rto", files, tmp_path / "run", rollout__servers=(server,))
        problems = find_problems(config, 1, {})
        assert any("before an @" in problem for problem in problems)
        assert CANARY not in " ".join(problems)


def test_an_open_run_folder_is_warned_of_and_a_new_one_is_private(tmp_path: Path) -> None:
    make_run_folder(tmp_path / "a/b")
    assert (tmp_path / "a/b").stat().st_mode & 0o777 == 0o700
    assert open_folder_warning(tmp_path / "a/b") is None
    assert open_folder_warning(tmp_path / "absent") is None
    for mode in (0o750, 0o701):
        (tmp_path / "a/b").chmod(mode)
        make_run_folder(tmp_path / "a/b")
        assert f"chmod 700 {tmp_path / 'a/b'}" in str(open_folder_warning(tmp_path / "a/b"))


def test_an_existing_open_run_folder_is_told_when_a_stage_starts(
    files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    assert run_ranks(1, train, configure("sft", files, tmp_path / "run", run__steps=1)) == [None]
    assert f"{tmp_path / 'run'} is open to other users" in capfd.readouterr().out


def test_text_of_others_cannot_control_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE, True)
    assert capsys.readouterr().out == f"{SHOWN}\n"
    _report(UserError(HOSTILE))
    assert SHOWN in capsys.readouterr().err
    one = Estimate(1.0, 0.1)
    console = Console(width=200)
    console.print(final_table([Evaluation(HOSTILE, one, one, one, one, 1, 1)], title=HOSTILE))
    shown = capsys.readouterr().out
    assert shown.count(SHOWN) == 2
    assert "\x1b" not in shown and "\x9b" not in shown


def test_hostile_prompts_of_a_run_reach_console_and_logs_as_text(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt_id": HOSTILE + str(i), "context_messages": [{"role": "user", "content": word}]}
        for i, word in enumerate(WORDS[:8])
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("RTO_FAULT", "fwd_bwd:1:0:nan")
    monkeypatch.setenv("RTO_FAULT_LOG", str(tmp_path / "faults.log"))
    config = configure(
        "rto", files, tmp_path / "run", run__steps=1, data__train=str(tmp_path / "prompts.jsonl")
    )
    assert run_ranks(1, train, config) == [None]
    out, err = capfd.readouterr()
    assert "[2J[bold]<script>" in out  # the refused update names its samples
    assert "\x1b" not in out + err
    assert b"\x1b" not in (tmp_path / "run/poisoned.jsonl").read_bytes()


def test_a_page_holds_text_of_others_as_text() -> None:
    page = _html_table([[HOSTILE, "b"], ["c", "<img src=x onerror=alert(1)>"]])
    assert "<script>" not in page and "<img" not in page
    assert "&lt;script&gt;" in page and "&lt;img" in page


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stage: sft\nstage: dpo\n", "duplicate"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "found the alias *a"),
        ("stage: " + "[" * 3000, "nested deeper than 20 levels"),
        ("stage: !!python/object/apply:os.getcwd []\n", "cannot be read as YAML"),
    ],
)
def test_hostile_recipes_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said.replace("*", r"\*")):
        load_recipe(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_code_is_neither_trained_nor_served(
    name: str, files: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "policy"
    folder.mkdir()
    for path in (files / "models/policy").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, "auto_map": {"AutoConfig": "evil.Config"}}))
    config = configure("sft", files, tmp_path / "run", models__policy=folder)
    (error,) = run_ranks(1, train, config)
    assert f"models.policy: {folder / name} names code that comes with the model" in str(error)
    with pytest.raises(ModelFolderError, match="auto_map"):
        start_server(
            ServerOptions(folder, tmp_path / "token", tmp_path / "log", dtype="fp32", max_model_len=8)
        )
