import gzip
import json
from pathlib import Path

import pytest
import sentencepiece

from rto_megatron.data.limits import Limits
from rto_megatron.data.loader import load_demonstrations, load_pairs, load_prompts
from rto_megatron.data.tokenizer import load_tokenizer, train_tokenizer

LIMITS = Limits(1024, 2048, "drop")
ROWS = {
    "preferences_train": 5035,
    "preferences_test": 511,
    "prompts_train": 730,
    "prompts_test": 75,
}


def rows_of(path: Path) -> list[dict[str, list[dict[str, str]]]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def real_tokenizer_folder(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    rows = rows_of(real_data / "preferences_train.jsonl.gz")
    texts = (turn["content"] for row in rows[:2000] for turn in row["chosen"])
    train_tokenizer(texts, folder, vocab_size=2048, byte_fallback=True)
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_every_file_loads(real_data: Path, real_tokenizer_folder: Path, name: str) -> None:
    tokenizer = load_tokenizer(real_tokenizer_folder)
    load = load_prompts if name.startswith("prompts") else load_pairs
    report = load(str(real_data / f"{name}.jsonl.gz"), tokenizer, LIMITS).report
    assert (report.rows, report.kept) == (ROWS[name], ROWS[name])


def test_text_survives_and_ids_equal_sentencepiece(real_data: Path, real_tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(real_tokenizer_folder)
    assert len(tokenizer) == 2048
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(real_tokenizer_folder / "tokenizer.model"))
    rows = rows_of(real_data / "preferences_test.jsonl.gz")
    texts = [row[answer][-1]["content"] for row in rows for answer in ("chosen", "rejected")]
    texts += [row["context_messages"][-1]["content"] for row in rows_of(real_data / "prompts_train.jsonl.gz")]
    # Hugging Face reads a control symbol that is spelt out in text as the symbol; SentencePiece does not.
    plain = [text for text in texts if "</s>" not in text]
    assert len(plain) > 1200
    assert any("print(" in text or "<html>" in text or "};" in text for text in plain)
    assert any(not text.isascii() for text in plain)
    for text in plain:
        ids = tokenizer.encode(text)
        assert ids == pieces.encode(text)
        assert tokenizer.decode(ids) == text


def test_answers_decode_to_the_text_of_the_row(real_data: Path, real_tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(real_tokenizer_folder)
    path = real_data / "preferences_test.jsonl.gz"
    limits = Limits(100_000, 200_000, "error")
    demonstrations = load_demonstrations(str(path), tokenizer, limits).items
    for row, demonstration in zip(rows_of(path), demonstrations, strict=True):
        answer = row["chosen"][-1]["content"].split("</s>")[0]
        assert tokenizer.decode(demonstration.response_ids) == f" {answer}</s>"
