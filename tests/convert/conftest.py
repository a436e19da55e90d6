"""Tiny models and what they were converted to, written once per session."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import convert
from tiny_families import write_family


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME and NAME_megatron of llama, a tied one, and one with experts, each of two layers; do not write into it."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "llama3_tied", "qwen3_moe"):
        write_family(folder / name, name, num_hidden_layers=2)
        convert("hf-to-megatron", folder / name, folder / f"{name}_megatron")
    return folder


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies one of `models` to damage it."""
    return lambda name: Path(shutil.copytree(models / name, tmp_path / name))
