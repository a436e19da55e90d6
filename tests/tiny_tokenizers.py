"""Faults of released tokenizers, put into the tiny folders of the tests."""

import json
from pathlib import Path


def change_json(path: Path, **entries: object) -> None:
    """Keys of a JSON object, new or replaced."""
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**values, **entries}))


def add_token(folder: Path, text: str) -> int:
    """A special token behind the vocabulary, which the embedding knows nothing of; returns its id."""
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    number = len(state["model"]["vocab"].keys() | {added["content"] for added in state["added_tokens"]})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    state["added_tokens"].append({"id": number, "content": text, **flags})
    path.write_text(json.dumps(state))
    return number


def set_padding(folder: Path, text: str | None, number: int | None) -> None:
    """The padding token, in the tokenizer's files and in config.json."""
    change_json(folder / "tokenizer_config.json", pad_token=text)
    change_json(folder / "config.json", pad_token_id=number)
