import json
import shutil
from pathlib import Path

import pytest
from data.sentencepiece_folders import INST, SAMPLES, SENTENCES, configure, random_texts, write_sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    TokenizersBackend,
)

from rto_megatron.data.tokenizer import (
    CHAT_TEMPLATE,
    encoding_fingerprint,
    load_tokenizer,
    tokenizer_fingerprint,
)


@pytest.mark.parametrize("part", ["vocab", "merges", "chat_template", "eos_token"])
def test_fingerprint_sees_every_part(tokenizer_folder: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(tokenizer_folder, folder)
    name = "tokenizer.json" if part in {"vocab", "merges"} else "tokenizer_config.json"
    document = json.loads((folder / name).read_text())
    if part == "vocab":
        vocab = document["model"]["vocab"]
        vocab["▁the"], vocab["▁dog"] = vocab["▁dog"], vocab["▁the"]
    elif part == "merges":
        document["model"]["merges"].reverse()
    else:
        document[part] = {"chat_template": document["chat_template"] + " ", "eos_token": "<pad>"}[part]
    (folder / name).write_text(json.dumps(document))
    assert tokenizer_fingerprint(folder) != tokenizer_fingerprint(tokenizer_folder)


@pytest.mark.parametrize(
    ("part", "is_same"),
    [
        ("vocab", False),
        ("merges", False),
        ("eos_token", False),
        ("chat_template", True),
        ("pad_token", True),
        ("added_name", True),
    ],
)
def test_encoding_fingerprint_sees_what_decides_ids(
    tokenizer_folder: Path, tmp_path: Path, part: str, is_same: bool
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(tokenizer_folder, folder)
    tokens, config = (folder / name for name in ("tokenizer.json", "tokenizer_config.json"))
    if part in {"vocab", "merges"}:
        document = json.loads(tokens.read_text())
        vocab = document["model"]["vocab"]
        vocab["▁the"], vocab["▁dog"] = vocab["▁dog"], vocab["▁the"]
        if part == "merges":
            document = json.loads(tokens.read_text())
            document["model"]["merges"].reverse()
        tokens.write_text(json.dumps(document))
    elif part == "added_name":
        tokens.write_text(tokens.read_text().replace("<|system|>", "<|reserved_0|>"))
        config.write_text(config.read_text().replace("<|system|>", "<|reserved_0|>"))
    else:
        document = json.loads(config.read_text())
        if part == "chat_template":
            del document[part]
        else:
            document[part] = {"eos_token": "<pad>", "pad_token": "</s>"}[part]
        config.write_text(json.dumps(document))
    assert (encoding_fingerprint(folder) == encoding_fingerprint(tokenizer_folder)) == is_same


@pytest.mark.parametrize(
    ("model_type", "converter"),
    [("bpe", LlamaTokenizer), ("bpe", TokenizersBackend), ("unigram", TokenizersBackend)],
)
def test_a_twin_that_transformers_made_has_the_same_encoding_fingerprint(
    tmp_path: Path, model_type: str, converter: type[TokenizersBackend]
) -> None:
    # transformers makes merges of a control symbol's letters, which no text can use.
    symbols = {"user_defined_symbols": ["<sep>", "▁▁"], "control_symbols": ["th"]}
    write_sentencepiece(tmp_path / "alone", model_type=model_type, **symbols)
    converter.from_pretrained(tmp_path / "alone").save_pretrained(tmp_path / "twin")
    assert encoding_fingerprint(tmp_path / "twin") == encoding_fingerprint(tmp_path / "alone")


def test_the_order_of_one_pieces_splits_is_not_in_the_encoding_fingerprint(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "twin")
    path = tmp_path / "twin" / "tokenizer.json"
    document = json.loads(path.read_text())
    merges = document["model"]["merges"]
    here = next(i for i in range(len(merges) - 1) if "".join(merges[i]) == "".join(merges[i + 1]))
    merges[here], merges[here + 1] = merges[here + 1], merges[here]
    path.write_text(json.dumps(document))
    assert encoding_fingerprint(tmp_path / "twin") == encoding_fingerprint(tokenizer_folder)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_fingerprints_tell_sentencepiece_models_apart(tmp_path: Path, model_type: str) -> None:
    prints = set()
    for name, options in (
        ("a", {}),
        ("pieces", {"vocab_size": 310 if model_type == "unigram" else 390}),
        ("eos", {"eos_piece": "[END]"}),
    ):
        write_sentencepiece(tmp_path / name, model_type=model_type, **options)
        configure(tmp_path / name, chat_template=INST)
        prints.add((encoding_fingerprint(tmp_path / name), tokenizer_fingerprint(tmp_path / name)))
    configure(tmp_path / "a", chat_template=INST + " ")
    assert (encoding_fingerprint(tmp_path / "a"), tokenizer_fingerprint(tmp_path / "a")) not in prints
    # The name of a special token is no part of the encoding.
    assert (len(prints), len({encoding for encoding, _ in prints})) == (3, 2)


def test_the_tokenizers_fingerprint_sees_how_text_is_normalised(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "a")
    configure(tmp_path / "a", chat_template=INST)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    model = ModelProto.FromString((tmp_path / "a" / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    (tmp_path / "b" / "tokenizer.model").write_bytes(model.SerializeToString())
    assert encoding_fingerprint(tmp_path / "a") == encoding_fingerprint(tmp_path / "b")
    assert tokenizer_fingerprint(tmp_path / "a") != tokenizer_fingerprint(tmp_path / "b")


def test_a_changed_score_changes_the_encoding_fingerprint(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "alone", model_type="unigram")
    TokenizersBackend.from_pretrained(tmp_path / "alone").save_pretrained(tmp_path / "twin")
    before = encoding_fingerprint(tmp_path / "twin")
    path = tmp_path / "twin" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"][-1][1] -= 1
    path.write_text(json.dumps(document))
    assert encoding_fingerprint(tmp_path / "twin") != before


def test_a_byte_level_tokenizer_loads_and_has_fingerprints(tmp_path: Path) -> None:
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(
        SENTENCES * 5, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    byte_level.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_end|>", "<s>")])
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level, bos_token="<s>", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(tmp_path / "a")
    tokenizer = load_tokenizer(tmp_path / "a")
    for text in (*SAMPLES, *random_texts(100)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == byte_level.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert encoding_fingerprint(tmp_path / "b") == encoding_fingerprint(tmp_path / "a")
    assert tokenizer_fingerprint(tmp_path / "b") == tokenizer_fingerprint(tmp_path / "a")
    path = tmp_path / "b" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"].pop(0)
    path.write_text(json.dumps(document))
    assert encoding_fingerprint(tmp_path / "b") != encoding_fingerprint(tmp_path / "a")
    assert tokenizer_fingerprint(tmp_path / "b") != tokenizer_fingerprint(tmp_path / "a")
