"""A finished run is told at once, and only where nothing is left to do."""

import shutil
from pathlib import Path

import pytest
import yaml
from ranks import run_ranks
from trainer.tiny_runs import configure, train
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.config.schema import Stage, TrainStage
from rto_megatron.lifecycle.status import ExitReason, Status, write_status
from rto_megatron.trainer.finished import is_finished


@pytest.fixture(scope="module")
def trained(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert run_ranks(1, train, configure("sft", files, run_dir)) == [None]
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A folder as `rto launch` leaves it."""
    write_status(shutil.copytree(trained, tmp_path / "run"), Status(ExitReason.DONE, 4, ""))
    return tmp_path / "run"


def finished(config: Stage) -> bool:
    assert isinstance(config, TrainStage)
    return is_finished(config)


def test_a_finished_run_is_told_without_its_models(run_dir: Path, files: Path, tmp_path: Path) -> None:
    """Nothing is started: the folder of its model does not exist."""
    recipe = tmp_path / "recipe.yaml"
    config = configure("sft", files, run_dir).model_dump(mode="json")
    recipe.write_text(yaml.safe_dump(config))
    before = sorted((path, path.stat().st_mtime_ns) for path in run_dir.rglob("*"))
    shutil.move(files / "models/policy", tmp_path / "moved")
    try:
        told = CliRunner().invoke(app, ["launch", str(recipe)])
        assert (told.exit_code, "has all of its 4 steps" in told.output) == (0, True), told.output
        longer = CliRunner().invoke(app, ["launch", str(recipe), "run.steps=5"])
        assert longer.exit_code != 0
        assert "models.policy" in str(longer.exception)
    finally:
        shutil.move(tmp_path / "moved", files / "models/policy")
    assert [entry for entry in before if not entry[0].name.startswith("run_status")] == sorted(
        (path, path.stat().st_mtime_ns)
        for path in run_dir.rglob("*")
        if not path.name.startswith(("run_status", "run.lock"))
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"run__steps": 5},
        {"run__steps": None},
        {"run__seed": 1},
        {"optimizer": {"lr": 2e-3, "warmup_fraction": 0.5}},
    ],
)
def test_a_run_that_another_recipe_goes_on_with_or_refuses_is_not_finished(
    changes: dict[str, object], run_dir: Path, files: Path
) -> None:
    assert finished(configure("sft", files, run_dir))
    assert not finished(configure("sft", files, run_dir, **changes))


def test_where_and_how_it_was_computed_may_differ(run_dir: Path, files: Path) -> None:
    assert finished(configure("sft", files, run_dir, "tp2", batch__micro=1, run__save_every=1))


@pytest.mark.parametrize("lost", ["hf", "checkpoints", "checkpoints/step_000004", "run_status.json"])
def test_a_folder_with_a_part_missing_is_not_finished(lost: str, run_dir: Path, files: Path) -> None:
    path = run_dir / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not finished(configure("sft", files, run_dir))


@pytest.mark.parametrize(
    ("path", "text"), [("run_status.json", "{"), ("checkpoints/step_000004/state.json", "{}")]
)
def test_a_damaged_folder_is_left_to_the_attempt_that_reads_it(
    path: str, text: str, run_dir: Path, files: Path
) -> None:
    (run_dir / path).write_text(text)
    assert not finished(configure("sft", files, run_dir))


def test_a_run_that_failed_after_its_last_step_is_not_finished(run_dir: Path, files: Path) -> None:
    write_status(run_dir, Status(ExitReason.DISK, 4, "no space left"))
    assert not finished(configure("sft", files, run_dir))
