import io
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TokenizersBackend,
)

from rto_megatron.data.chat import encode_exchange, encode_text
from rto_megatron.data.messages import Conversation, Message
from rto_megatron.data.template import ChatTemplate
from rto_megatron.data.tokenizer import (
    CHAT_TEMPLATE,
    encoding_fingerprint,
    load_tokenizer,
    tokenizer_fingerprint,
    tokens_with,
    train_tokenizer,
)
from rto_megatron.errors import TokenizerError, UserError

SAMPLES = (
    "The quick brown fox.",
    "  leading and  double spaces ",
    "def f(x):\n\treturn x ** 2  # four  spaces\n\n\n",
    "東京 Привет naïve 😀👩‍🚀 \u00a0 end",
    "aaaa ---- ==== ....",
    "<|user|> hi<|assistant|> there",
    "",
)


def pieces_of(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


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


SENTENCES = (
    "The quick brown fox jumps over the lazy dog; the dog sleeps.",
    "def add(a, b): return a + b  # sum",
    "Naïve café, 東京 and Привет: text of many scripts.",
    "Write a short answer to the question about the fox and the dog.",
)
FRAGMENTS = (
    *(
        "the",
        "dog",
        "fox",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "-",
        "1",
        "xq",
        "\u00a0",
        "\u3000",
        "▁",
        "<0x0A>",
        "<sep>",
    ),
    *("é", "e\u0301", "か\u3099", "각", "京", "ﬁ", "①", "😀", "👩‍🚀", "<unk", "\u200d"),
)
INST = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


def write_sentencepiece(folder: Path, **options: object) -> sentencepiece.SentencePieceProcessor:
    """A folder with SentencePiece's file alone, of a small model with ids 0 to 2 for <unk>, <s> and </s>."""
    written = io.BytesIO()
    given = {
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "character_coverage": 0.9995,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_writer=written,
        num_threads=1,
        minloglevel=2,
        **(given | options),
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return pieces_of(folder)


def configure(folder: Path, **config: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def random_texts(number: int) -> list[str]:
    rng = random.Random(0)
    return [
        "".join(rng.choice(FRAGMENTS) * rng.randint(1, 3) for _ in range(rng.randint(0, 12)))
        for _ in range(number)
    ]


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("add_dummy_prefix", [True, False])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_a_folder_with_sentencepiece_alone_gives_its_ids(
    tmp_path: Path, model_type: str, add_dummy_prefix: bool, rule: str, byte_fallback: bool
) -> None:
    pieces = write_sentencepiece(
        tmp_path / "t",
        model_type=model_type,
        add_dummy_prefix=add_dummy_prefix,
        normalization_rule_name=rule,
        remove_extra_whitespaces=rule != "identity",
        byte_fallback=byte_fallback,
        user_defined_symbols=["<sep>", "  "],
    )
    configure(tmp_path / "t", tokenizer_class="LlamaTokenizer", add_bos_token=False, chat_template=INST)
    tokenizer = load_tokenizer(tmp_path / "t")
    assert len(tokenizer) == len(pieces)
    for text in [" leading", "  two  spaces  ", "line\nbreak\n\n", "", "   ", *random_texts(300)]:
        ids = pieces.encode(text)
        assert tokenizer.encode(text) == ids, repr(text)
        if 0 not in ids:  # SentencePiece writes an unknown piece as " ⁇ "
            assert tokenizer.decode(ids) == pieces.decode(ids), repr(text)


def test_special_tokens_come_from_the_model_and_then_from_the_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    symbols = {"unk_id": 1, "bos_id": 2, "eos_id": 3, "pad_id": 0, "pad_piece": "[PAD]", "eos_piece": "[END]"}
    pieces = write_sentencepiece(folder, control_symbols=["<|im_end|>"], **symbols)
    configure(folder, chat_template=INST)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.unk_token, tokenizer.bos_token) == ("<unk>", "<s>")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("[END]", "[PAD]")
    assert [getattr(tokenizer, f"{name}_token_id") for name in ("unk", "bos", "eos", "pad")] == [1, 2, 3, 0]
    # Each stretch between special tokens is a text of its own; SentencePiece takes no special token from text.
    text = "<s>[INST] the dog [/INST] fox  ran[END]<|im_end|>\n"
    between = pieces.encode("[INST] the dog [/INST] fox  ran")
    expected = [2, *between, 3, pieces.piece_to_id("<|im_end|>"), *pieces.encode("\n")]
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.decode(tokenizer.encode("<s>the dog[END] fox")) == "<s>the dog[END]fox"
    assert tokenizer.decode(expected[:-1], skip_special_tokens=True) == pieces.decode(between)

    added = {str(len(pieces)): {"content": "<|end|>", "special": True, "normalized": False}}
    configure(folder, chat_template=INST, eos_token="<|end|>", added_tokens_decoder=added)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token_id, len(tokenizer)) == (len(pieces), len(pieces) + 1)
    assert tokenizer.encode("fox<|end|>") == [*pieces.encode("fox"), len(pieces)]


def test_special_tokens_without_a_name_in_the_model_are_none(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "t", bos_id=-1, eos_id=-1)
    configure(tmp_path / "t", chat_template=INST)
    with pytest.raises(TokenizerError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path / "t")
    configure(tmp_path / "t", chat_template=INST, eos_token="<unk>")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (None, None, 0)


def test_a_text_begins_with_bos_where_the_folder_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    ids = tuple(write_sentencepiece(folder).encode("the dog"))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for config, has_bos in (
        ({}, False),
        ({"add_bos_token": True}, True),
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        ({"tokenizer_class": "LlamaTokenizerFast"}, True),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, False),
    ):
        configure(folder, chat_template=template, **config)
        tokenizer = load_tokenizer(folder)
        assert encode_text(tokenizer, "the dog") == ((1, *ids) if has_bos else ids), config


def test_a_conversation_of_a_folder_with_sentencepiece_alone(tmp_path: Path) -> None:
    pieces = write_sentencepiece(tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    turns = Conversation((Message("user", "the dog"), Message("assistant", "a fox")))
    exchange = encode_exchange(ChatTemplate(load_tokenizer(tmp_path / "t")), turns, "row 1")
    prompt = pieces.encode("[INST] the dog [/INST]")
    whole = pieces.encode("[INST] the dog [/INST] a fox")
    assert whole[: len(prompt)] == prompt
    assert exchange.prompt_ids == (1, *prompt)
    assert exchange.answer_ids == (*whole[len(prompt) :], 2)


def test_a_folder_with_sentencepiece_alone_needs_a_template_and_a_sentencepiece_model(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "t")
    with pytest.raises(TokenizerError, match="no chat template"):
        load_tokenizer(tmp_path / "t")
    encoding_fingerprint(tmp_path / "t")
    (tmp_path / "t" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's format
    with pytest.raises(TokenizerError, match="no SentencePiece model"):
        load_tokenizer(tmp_path / "t")


def test_the_configuration_cannot_make_ids_random(tmp_path: Path) -> None:
    pieces = write_sentencepiece(tmp_path / "t", model_type="unigram")
    sampled = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}
    configure(tmp_path / "t", chat_template=INST, sp_model_kwargs=sampled)
    tokenizer = load_tokenizer(tmp_path / "t")
    text = "the quick brown fox jumps over the lazy dog"
    assert all(tokenizer.encode(text) == pieces.encode(text) for _ in range(20))


def test_a_twin_is_not_needed(
    tokenizer_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "alone"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "tokenizer.json").unlink()
    alone = load_tokenizer(folder)
    for text in (*SAMPLES, *random_texts(300), "<s><|user|> Hi<|assistant|> the dog</s>"):
        ids = tokenizer.encode(text)
        assert alone.encode(text) == ids, repr(text)
        assert alone.decode(ids) == tokenizer.decode(ids), repr(text)
    assert tokens_with(alone, (".", "\n", "dog")) == tokens_with(tokenizer, (".", "\n", "dog"))
    assert encoding_fingerprint(folder) == encoding_fingerprint(tokenizer_folder)
    assert tokenizer_fingerprint(folder) != tokenizer_fingerprint(tokenizer_folder)


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
