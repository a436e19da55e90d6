import json
import random
import shutil
from pathlib import Path

import pytest
from data.sentencepiece_folders import SAMPLES, pieces_of
from tokenizers import Tokenizer
from transformers import (
    LlamaConfig,
    PreTrainedTokenizerBase,
)

from rto_megatron.data.tokenizer import (
    CHAT_TEMPLATE,
    load_tokenizer,
    tokenizer_fingerprint,
    tokens_with,
    train_tokenizer,
)
from rto_megatron.errors import TokenizerError, UserError


@pytest.mark.parametrize("text", SAMPLES)
def test_hugging_face_gives_the_ids_of_sentencepiece(
    tokenizer_folder: Path, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    assert tokenizer.encode(text) == pieces_of(tokenizer_folder).encode(text)


def test_hugging_face_gives_the_ids_of_sentencepiece_on_random_text(
    tokenizer_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rng = random.Random(0)
    pieces = pieces_of(tokenizer_folder)
    words = ["the", "dog", " ", "  ", "\n", "-", "é", "京", "😀", "xq", "fox", "def", "+", "1", "e", "▁"]
    for _ in range(2000):
        text = "".join(rng.choice(words) * rng.randint(1, 4) for _ in range(rng.randint(1, 12)))
        assert tokenizer.encode(text) == pieces.encode(text), repr(text)


@pytest.mark.parametrize("text", SAMPLES)
def test_text_survives_encoding(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_distinct_single_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (
        tokenizer.unk_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    ) == (
        0,
        1,
        2,
        3,
    )
    assert [len(tokenizer.encode(f"<|{role}|>")) for role in ("system", "user", "assistant")] == [1, 1, 1]


def test_chat_template_by_hand(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the dog"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<s><|user|> Hi<|assistant|> the dog</s>"
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<s><|user|> Hi<|assistant|>"


def test_a_sampled_answer_that_becomes_a_text_keeps_its_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    asked, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the dog"}
    prompt = tokenizer.apply_chat_template([asked], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([asked, said], return_dict=False)
    decoded = tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True)
    assert decoded == " the dog"  # the marker of the role has no space behind it
    again = [asked, {"role": "assistant", "content": decoded}]
    assert tokenizer.apply_chat_template(again, return_dict=False) == whole


def test_a_model_folder_loads_the_same_tokenizer(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "model")
    LlamaConfig(vocab_size=400).save_pretrained(tmp_path / "model")
    assert tokenizer_fingerprint(tmp_path / "model") == tokenizer_fingerprint(tokenizer_folder)
    text = "fox  and dog"
    assert load_tokenizer(tmp_path / "model").encode(text) == pieces_of(tokenizer_folder).encode(text)


def test_the_file_counts_whatever_class_the_folder_names(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer"}))
    of_file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    for text in SAMPLES:
        want = of_file.encode(text, add_special_tokens=False).ids
        assert loaded.encode(text, add_special_tokens=False) == want
    assert loaded.eos_token == "</s>" and loaded.chat_template == CHAT_TEMPLATE


def test_training_is_deterministic(tokenizer_folder: Path, tmp_path: Path) -> None:
    texts = ["one two three four", "two three four five"]
    for name in ("a", "b"):
        train_tokenizer(texts, tmp_path / name, vocab_size=40, byte_fallback=False)
    assert tokenizer_fingerprint(tmp_path / "a") == tokenizer_fingerprint(tmp_path / "b")
    assert tokenizer_fingerprint(tmp_path / "a") != tokenizer_fingerprint(tokenizer_folder)


def test_unknown_characters_without_byte_fallback_match_too(tmp_path: Path) -> None:
    train_tokenizer(["one two three"], tmp_path / "t", vocab_size=40, byte_fallback=False)
    text = "one 東京 two é"
    assert load_tokenizer(tmp_path / "t").encode(text) == pieces_of(tmp_path / "t").encode(text)


def test_a_missing_or_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("key", "message"), [("chat_template", "no chat template"), ("eos_token", "no end-of-sequence token")]
)
def test_a_tokenizer_without_what_training_needs_is_refused(
    tokenizer_folder: Path, tmp_path: Path, key: str, message: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(tokenizer_folder, folder)
    document = json.loads((folder / "tokenizer_config.json").read_text())
    del document[key]
    (folder / "tokenizer_config.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(folder)


def test_training_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="needs text"):
        train_tokenizer(["", " \n "], tmp_path / "t", vocab_size=300, byte_fallback=True)
    with pytest.raises(TokenizerError, match="larger vocab_size"):
        train_tokenizer(["one two"], tmp_path / "t", vocab_size=20, byte_fallback=True)


def test_tokens_are_found_by_what_their_text_holds(tokenizer: PreTrainedTokenizerBase) -> None:
    found = tokens_with(tokenizer, (".", "\n", "dog"))
    special = set(tokenizer.all_special_ids)
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        expected = token not in special and any(part in text for part in (".", "\n", "dog"))
        assert (token in found) == expected, (token, text)
    texts = {tokenizer.decode([token]) for token in found}
    assert {".", "\n"} <= texts and any("dog" in text and text != "dog" for text in texts)


def test_special_tokens_hold_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    # "</s>" and "<|user|>" are spelt with these characters.
    for string in ("/", "|", "<", "user"):
        try:
            found = tokens_with(tokenizer, (string,))
        except UserError:
            continue
        assert not found & set(tokenizer.all_special_ids)


def test_text_that_no_token_holds_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TokenizerError, match=r"no token of the vocabulary holds one of \['zzz', '</s>'\]"):
        tokens_with(tokenizer, iter(("zzz", "</s>")))
