"""A tokenizer that does not fit its model is carried byte for byte, and the report and the table say what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
from convert.commands import convert
from tiny_models import write_llama
from tiny_tokenizers import add_token, change_json, set_padding

from rto_megatron.data.tokenizer import train_tokenizer

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A reward model with as many rows as its tokenizer has ids."""
    folder = tmp_path / "source"
    train_tokenizer(["red fox blue dog"] * 3, folder, vocab_size=60, byte_fallback=False)
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    write_llama(folder, vocab_size=size, is_scalar=True)
    return folder


def _notes(source: Path, root: Path) -> list[str]:
    """The notes of both directions as the reports have them; the tables show them too, and so does a dry run."""
    found = []
    for number, (direction, start) in enumerate(
        (("hf-to-megatron", source), ("megatron-to-hf", root / "converted0"))
    ):
        target = root / f"converted{number}"
        planned = convert(direction, start, target, "--dry-run")
        shown = convert(direction, start, target)
        notes = json.loads((target / "conversion_report.json").read_text())["notes"]
        for note in notes:
            assert " ".join(note.split())[:60] in " ".join(planned.split())
            assert " ".join(note.split())[:60] in " ".join(shown.split())
        found += notes
        files = target / "hf" if number == 0 else target
        for name in TOKENIZER:
            assert (files / name).read_bytes() == (source / name).read_bytes()
    return found


def test_a_tokenizer_that_fits_is_nothing_to_speak_of(source: Path, tmp_path: Path) -> None:
    assert _notes(source, tmp_path) == []


def test_padding_behind_the_embedding_is_carried_and_reported(source: Path, tmp_path: Path) -> None:
    number = add_token(source, "<|pad|>")
    change_json(source / "tokenizer_config.json", pad_token="<|pad|>")
    notes = _notes(source, tmp_path)
    assert len(notes) == 2
    for note in notes:
        assert (
            f"the embedding (vocab_size={number}) has no row for '<|pad|>' (id {number}) (the padding token)"
            in note
        )


def test_an_end_of_sequence_behind_the_embedding_is_reported_as_what_stages_refuse(
    source: Path, tmp_path: Path
) -> None:
    number = add_token(source, "<|end|>")
    change_json(source / "tokenizer_config.json", eos_token="<|end|>")
    for note in _notes(source, tmp_path):
        assert (
            f"the token '<|end|>' (id {number}), the end-of-sequence token, has no row in the embedding"
            in note
        )


def test_of_padding_config_json_decides(source: Path, tmp_path: Path) -> None:
    change_json(source / "tokenizer_config.json", pad_token=None)
    change_json(source / "config.json", pad_token_id=2)
    notes = _notes(source, tmp_path)
    assert len(notes) == 2 and all("one token before" in note for note in notes)


def test_padding_that_ends_sequences_is_reported_of_a_scalar_model_alone(
    source: Path, tmp_path: Path
) -> None:
    set_padding(source, "</s>", 2)
    for note in _notes(source, tmp_path):
        assert note.startswith(
            "transformers reads scores one token before the end-of-sequence token '</s>', which is the padding token"
        )
    language = tmp_path / "language"
    shutil.copytree(source, language)
    write_llama(language, vocab_size=json.loads((source / "config.json").read_text())["vocab_size"])
    set_padding(language, "</s>", 2)
    (tmp_path / "other").mkdir()
    assert _notes(language, tmp_path / "other") == []


def test_a_tokenizer_that_cannot_be_read_is_carried_all_the_same(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    assert all(
        note.startswith("the tokenizer is carried unread: no tokenizer") for note in _notes(source, tmp_path)
    )
