"""Which ids have no row in an embedding, and what puts them into examples."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_tokenizers import add_token, change_json

from rto_megatron.data.tokenizer import load_plain_tokenizer
from rto_megatron.data.vocabulary import (
    Embedding,
    require_rows,
    smallest_embedding,
    spare_tokens,
    token_ids,
    vocabulary_problems,
)
from rto_megatron.errors import DataError
from rto_megatron.types import Demonstration, JudgedResponse, PreferencePair, Prompt


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A tokenizer of its own, with two special tokens behind its vocabulary."""
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    for name in ("one", "two"):
        add_token(tmp_path / "tokenizer", f"<|{name}|>")
    return tmp_path / "tokenizer"


def _beyond(folder: Path) -> Embedding:
    """An embedding without rows for the two last tokens."""
    return Embedding("models.reward", len(load_plain_tokenizer(folder)) - 2)


def test_the_smallest_embedding_decides() -> None:
    assert smallest_embedding({"a": 5, "b": 3, "c": 4}) == Embedding("b", 3)


def test_an_id_has_a_row_below_the_size_of_the_vocabulary_alone() -> None:
    assert [Embedding("a", 3).lacks(token) for token in (0, 2, 3)] == [False, False, True]


@pytest.mark.parametrize(
    ("example", "ids"),
    [
        (Prompt("a", (1, 2)), {1, 2}),
        (Demonstration("a", (1,), (3,)), {1, 3}),
        (PreferencePair("a", (1,), (4,), (5,), 0.0), {1, 4, 5}),
        (JudgedResponse("a", (1,), (6,), True, (7,)), {1, 6, 7}),
    ],
)
def test_every_id_of_an_example_counts(
    example: Prompt | Demonstration | PreferencePair | JudgedResponse, ids: set[int]
) -> None:
    assert {*token_ids(example)} == ids


@pytest.mark.parametrize(
    ("change", "writer"),
    [
        ({"eos_token": "<|one|>"}, "the end-of-sequence token"),
        (
            {"chat_template": "{{ bos_token }}{{ messages[0].content }}<|one|>"},
            "which the chat template writes",
        ),
        (
            {"bos_token": "<|one|>"},
            "which the chat template writes",
        ),  # its own template opens with {{ bos_token }}
    ],
)
def test_what_every_example_holds_is_a_problem_and_the_rest_is_spare(
    change: dict[str, str], writer: str, folder: Path
) -> None:
    change_json(folder / "tokenizer_config.json", **change)
    tokenizer, embedding = load_plain_tokenizer(folder), _beyond(folder)
    (problem,) = vocabulary_problems(tokenizer, embedding)
    number = embedding.num_rows
    assert problem.startswith(f"models.reward: the token '<|one|>' (id {number}), {writer}, has no row")
    assert f"resize that embedding to {number + 1} rows or more" in problem
    spare = spare_tokens(tokenizer, embedding)
    assert spare is not None and f"'<|two|>' (id {number + 1})" in spare and "<|one|>" not in spare


def test_a_token_before_every_text_is_a_problem_without_a_template(folder: Path) -> None:
    path = folder / "tokenizer.json"
    number = _beyond(folder).num_rows
    single = [{"SpecialToken": {"id": "<|one|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    added = {"<|one|>": {"id": "<|one|>", "ids": [number], "tokens": ["<|one|>"]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": added}
    change_json(path, post_processor=template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|one|>"}))
    (problem,) = vocabulary_problems(load_plain_tokenizer(folder), _beyond(folder))
    assert "'<|one|>'" in problem and "which the tokenizer puts before every text" in problem


def test_a_template_that_refuses_the_probe_is_no_problem(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", chat_template="{{ raise_exception('no') }}")
    assert vocabulary_problems(load_plain_tokenizer(folder), _beyond(folder)) == []


def test_an_embedding_with_a_row_for_every_id_has_nothing_to_say(folder: Path) -> None:
    tokenizer = load_plain_tokenizer(folder)
    embedding = Embedding("models.policy", len(tokenizer))
    assert vocabulary_problems(tokenizer, embedding) == [] and spare_tokens(tokenizer, embedding) is None
    require_rows("data", [("a", (0, len(tokenizer) - 1)), ("empty", ())], tokenizer, embedding)


def test_every_token_of_the_data_is_named_with_its_first_row(folder: Path) -> None:
    template = "{% if messages|length > 5 %}<|two|>{% endif %}{{ messages[0].content }}"
    change_json(folder / "tokenizer_config.json", chat_template=template)
    tokenizer, embedding = load_plain_tokenizer(folder), _beyond(folder)
    number = embedding.num_rows
    rows = [("a", (1, 2)), ("b", (number + 1, 3)), ("c", (number, number + 1))]
    with pytest.raises(DataError) as caught:
        require_rows("data.jsonl", rows, tokenizer, embedding)
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith(f"data.jsonl: models.reward has no row in the embedding (vocab_size={number})")
    assert f"resize that embedding to {number + 2} rows or more" in heading
    assert [line.strip() for line in lines] == [
        f"'<|one|>' (id {number}), which the text spells: first in c",
        f"'<|two|>' (id {number + 1}), which the chat template writes: first in b",
    ]
