"""Tiny model folders and data, written once per session."""

from pathlib import Path

import pytest
from trainer.tiny_runs import write_files


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, models and data of tiny runs; do not write into it."""
    root = tmp_path_factory.mktemp("tiny_files")
    write_files(root)
    return root
