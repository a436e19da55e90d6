"""Which token a reward model's folder pads with: one that ends no sequence, has a row and is used by nothing."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_tokenizers import add_token, change_json, set_padding
from transformers import AutoTokenizer

from rto_megatron.data.padding_token import separate_padding
from rto_megatron.data.tokenizer import load_plain_tokenizer

EOS, EOS_ID = "</s>", 2
NO_PAD = 3  # the tokenizer's own <pad>, renamed


def _folder(source: Path, folder: Path, *tokens: str) -> tuple[Path, list[int]]:
    """A tokenizer that pads with its end of sequence, with more special tokens, and their ids."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"<pad>"', '"<|user_of_old|>"'))
    ids = [add_token(folder, token) for token in tokens]
    change_json(folder / "config.json", vocab_size=ids[-1] + 1 if ids else 1000, eos_token_id=EOS_ID)
    set_padding(folder, EOS, EOS_ID)
    return folder, ids


def _padding(folder: Path) -> tuple[int | None, int | None]:
    """The padding token as transformers loads it, and as config.json names it."""
    return (
        AutoTokenizer.from_pretrained(folder).pad_token_id,
        json.loads((folder / "config.json").read_text())["pad_token_id"],
    )


@pytest.mark.parametrize(
    ("tokens", "chosen"),
    [
        (["<|vision_start|>", "<|fine_right_pad_id|>", "<|reserved_0|>"], 1),
        (["<|vision_start|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"], 1),
        (["<|vision_start|>", "<|vision_end|>"], None),  # then the first of all: the tokenizer's own at 3
    ],
)
def test_a_token_named_for_it_is_taken_first(
    tokens: Sequence[str], chosen: int | None, tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder, ids = _folder(tokenizer_folder, tmp_path / "t", *tokens)
    said = separate_padding(folder, ())
    expected = NO_PAD if chosen is None else ids[chosen]
    assert _padding(folder) == (expected, expected)
    assert (
        said is not None and f"(id {expected}), which nothing else writes, as '{EOS}' ends sequences" in said
    )
    assert separate_padding(folder, ()) is None  # a second time changes nothing


USED = {
    "bos": {"bos_token": "<|pad_a|>"},
    "unk": {"unk_token": "<|pad_a|>"},
    "mask": {"mask_token": "<|pad_a|>"},
    "template": {"chat_template": "{{ messages[0].content }}{% if tools %}<|pad_a|>{% endif %}"},
    "template's parts": {
        "chat_template": "{% for m in messages %}{{ '<|pad_' ~ 'a|>' ~ m.content }}{% endfor %}"
    },
    "system turns": {
        "chat_template": "{% for m in messages %}{{ '<|pad_' ~ {'system': 'a'}.get(m.role) ~ '|>' }}{% endfor %}"
    },
}


@pytest.mark.parametrize("change", USED.values(), ids=USED.keys())
def test_a_token_with_a_task_is_not_taken(
    change: dict[str, str], tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder, (_, other) = _folder(tokenizer_folder, tmp_path / "t", "<|pad_a|>", "<|reserved|>")
    change_json(folder / "tokenizer_config.json", **change)
    separate_padding(folder, ())
    assert _padding(folder) == (other, other)


def test_tokens_of_the_data_other_ends_and_tokens_without_a_row_are_not_taken(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    names = ("<|pad_data|>", "<|pad_config|>", "<|pad_generation|>", "<|free|>", "<|pad_beyond|>")
    folder, ids = _folder(tokenizer_folder, tmp_path / "t", *names)
    change_json(folder / "config.json", eos_token_id=[EOS_ID, ids[1]], vocab_size=ids[4])
    change_json(folder / "generation_config.json", eos_token_id=ids[2], pad_token_id=EOS_ID)
    separate_padding(folder, {ids[0], NO_PAD})
    assert _padding(folder) == (ids[3], ids[3])
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "eos_token_id": ids[2],
        "pad_token_id": ids[3],
    }


def test_the_choice_of_config_json_comes_first(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder, (_, other) = _folder(tokenizer_folder, tmp_path / "t", "<|pad|>", "<|free|>")
    set_padding(folder, None, other)
    assert "as there was none" in str(separate_padding(folder, ()))
    assert _padding(folder) == (other, other)


def test_padding_without_a_row_is_replaced(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder, (first, second) = _folder(tokenizer_folder, tmp_path / "t", "<|reserved|>", "<|pad|>")
    change_json(folder / "config.json", vocab_size=second)
    set_padding(folder, "<|pad|>", second)
    assert f"as '<|pad|>' (id {second}) has no row in the embedding" in str(separate_padding(folder, ()))
    assert _padding(folder) == (first, first)


def test_padding_that_ends_nothing_stays_and_config_json_agrees_with_it(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "t")
    change_json(tmp_path / "t/config.json", vocab_size=1000, pad_token_id=0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "t").glob("tokenizer*")}
    assert separate_padding(tmp_path / "t", ()) is None
    assert _padding(tmp_path / "t") == (3, 3)
    assert {path.name: path.read_bytes() for path in (tmp_path / "t").glob("tokenizer*")} == before


def test_every_file_that_names_the_padding_is_changed(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder, (number,) = _folder(tokenizer_folder, tmp_path / "t", "<|pad|>")
    padding = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None}
    change_json(
        folder / "tokenizer.json", padding={**padding, "pad_id": EOS_ID, "pad_type_id": 0, "pad_token": EOS}
    )
    change_json(folder / "special_tokens_map.json", eos_token=EOS, pad_token={"content": EOS})
    separate_padding(folder, ())
    written = json.loads((folder / "tokenizer.json").read_text())["padding"]
    assert written == {**padding, "pad_id": number, "pad_type_id": 0, "pad_token": "<|pad|>"}
    names = json.loads((folder / "special_tokens_map.json").read_text())
    assert names == {"eos_token": EOS, "pad_token": "<|pad|>"}


def test_a_tokenizer_of_sentencepiece_alone_takes_a_control_piece(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    shutil.copy(tokenizer_folder / "tokenizer.model", folder)
    change_json(folder / "config.json", vocab_size=1000, pad_token_id=EOS_ID)
    change_json(folder / "tokenizer_config.json", pad_token=EOS)
    separate_padding(folder, ())
    assert load_plain_tokenizer(folder).pad_token == "<pad>"
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 3
