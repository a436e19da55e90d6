"""The account of a start: the launcher begins it, a rank goes on with it, and the parts add up to the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rto_megatron.lifecycle.start_up import begin_launch, begin_part, begin_rank, take_parts, told_start

SFT = Path(__file__).parents[2] / "launchers/recipes/quickstart/sft.yaml"


def test_parts_of_launcher_and_rank_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = "launcher=10.0 torchrun=13.9 imports=14.5 groups=19.5 imports=20.0 models=24.5 data=24.75"
    monkeypatch.setenv("RTO_START_UP", noted)
    parts = take_parts()
    last = parts.pop("data")
    assert parts == pytest.approx(
        {"launcher": 3.9, "torchrun": 0.6, "imports": 9.5, "groups": 0.5, "models": 0.25}
    )
    assert last > 0
    assert take_parts() == {}  # it is told once
    begin_part("models")
    assert take_parts() == {}  # and not begun by a part


def test_a_launcher_looks_at_its_run_and_its_models_without_megatron(tmp_path: Path) -> None:
    """Which takes as long to import as all else of a launcher, and every rank imports it anyway."""
    launched = ["launch", str(SFT), f"run.dir={tmp_path / 'run'}", f"models.policy={tmp_path / 'absent'}"]
    script = (
        "import sys; from typer.testing import CliRunner; from rto_megatron.cli.main import app;"
        f"print(CliRunner().invoke(app, {launched!r}).exception); print('megatron.core' in sys.modules)"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    refused, has_megatron = told.stdout.splitlines()[-2:]
    assert "absent" in refused and has_megatron == "False", told.stdout


def test_a_second_attempt_begins_anew() -> None:
    begin_launch()
    begin_part("torchrun")
    begin_launch(is_first=False)
    begin_rank()
    notes = [note.split("=") for note in os.environ["RTO_START_UP"].split()]
    assert [name for name, _ in notes] == ["launcher", "imports"]
    assert float(notes[0][1]) > float(notes[1][1])  # of this process, which stands for both


def test_the_line_names_what_the_first_step_did() -> None:
    parts = {"imports": 9.46, "pool": 18.0}
    means = {
        "time/step_s": 6.0,
        "time/push_s": 4.0,
        "time/update_s": 1.52,
        "time/generate_s": 1.0,
        "loss": 2.0,
    }
    assert told_start(parts) == "start-up 27.5 s: imports 9.5, pool 18.0"
    assert told_start(parts, means) == (
        "start-up 27.5 s: imports 9.5, pool 18.0; first step 6.0 s: push 4.0, update 1.5"
    )
    assert told_start(parts, {"time/step_s": 6.0}).endswith("; first step 6.0 s")
