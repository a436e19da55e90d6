"""A language model and a run that saved it, written once per session."""

from pathlib import Path

import pytest
from engine.saved_steps import save_ending
from ranks import run_ranks
from tiny_models import write_llama


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model."""
    folder = tmp_path_factory.mktemp("model")
    write_llama(folder, 7)
    return folder


@pytest.fixture(scope="session")
def two_steps(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 2 and 4, of two ranks; do not write into it."""
    run_dir = tmp_path_factory.mktemp("run")
    assert run_ranks(2, save_ending, "tp2", model_folder, run_dir, (2, 4)) == ["saved"] * 2
    return run_dir
