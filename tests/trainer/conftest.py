"""Tiny model folders and data, written once per session."""

import shutil
from pathlib import Path

import pytest
from pool_server import VOCAB_SIZE, tiny_llama
from tiny_models import write_llama
from trainer.tiny_runs import MODELS, SCALAR, write_files


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, models and data; do not write into it."""
    root = tmp_path_factory.mktemp("files")
    write_files(root)
    return root


@pytest.fixture(scope="module")
def pool_files(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `files` has, with a policy that the server can hold."""
    root = tmp_path_factory.mktemp("pool_files")
    shutil.copy(files / "prompts.jsonl", root)
    for role, seed in MODELS.items():
        folder = root / "models" / role
        if role == "policy":
            tiny_llama(seed).save_pretrained(folder)
        else:
            write_llama(folder, seed, vocab_size=VOCAB_SIZE, is_scalar=role in SCALAR)
        shutil.copytree(files / "tokenizer", folder, dirs_exist_ok=True)
    return root
