import shutil
from pathlib import Path

import pytest
from data.sentencepiece_folders import INST, SAMPLES, configure, random_texts, write_sentencepiece
from transformers import (
    PreTrainedTokenizerBase,
)

from rto_megatron.data.chat import encode_exchange, encode_text
from rto_megatron.data.messages import Conversation, Message
from rto_megatron.data.template import ChatTemplate
from rto_megatron.data.tokenizer import (
    encoding_fingerprint,
    load_tokenizer,
    tokenizer_fingerprint,
    tokens_with,
)
from rto_megatron.errors import TokenizerError


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
