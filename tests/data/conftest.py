"""Tokenizers and the synthetic task, written once per session."""

import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from rto_megatron.data.synthetic import Sizes, write_synthetic_task
from rto_megatron.data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = (
    "The quick brown fox jumps over the lazy dog; the dog sleeps.",
    "def add(a, b):\n    return a + b  # sum",
    "Naïve café, 東京 and Привет: text of many scripts.",
    "Write a short answer to the question about the fox and the dog.",
)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS * 5, folder, vocab_size=400, byte_fallback=True)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tokenizer_folder)


SMALL = Sizes(
    demonstrations=400, eval_demonstrations=20, pairs=800, eval_pairs=40, prompts=100, eval_prompts=30
)


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic_task(folder, seed=7, sizes=SMALL)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    default = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("RTO_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip("no real data: set RTO_TEST_DATA to a folder with it")
    return folder
