"""Trains a SentencePiece tokenizer, writes it as a Hugging Face folder, and fingerprints folders.

The folder holds SentencePiece's own file and a tokenizer.json with the same pieces, and both give the
same ids. That is possible because the model adds no dummy prefix and normalises nothing: a space is the
meta symbol `▁`, and every other character stands for itself. A marker of the chat template is followed by
a space, so the first word of a message is the same piece as anywhere else, and the space belongs to the
answer: the prompt's ids are a prefix.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rto_megatron.errors import UserError

SPACE = "▁"
UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
ASSISTANT_MARKER = "<|assistant|>"
ROLE_MARKERS = ("<|system|>", "<|user|>", ASSISTANT_MARKER)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MODEL_MAX_LENGTH = 1_000_000  # the data configuration limits lengths; the tokenizer must not cut silently


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int, byte_fallback: bool) -> None:
    """Train a byte-pair-encoding SentencePiece model and write it as a Hugging Face folder.

    Args:
        texts: training text; pieces never cross a space or a line break.
        folder: created if missing; gets tokenizer.model, tokenizer.json and tokenizer_config.json.
        vocab_size: number of ids; fewer if the text has fewer pieces.
        byte_fallback: spell unknown characters as bytes (any text survives), else they become `<unk>`.

    Raises:
        UserError: the texts are empty, or hold more distinct characters than the vocabulary has room for.
    """
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError("training a tokenizer needs text, and all the texts are empty; check the data files")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=byte_fallback,
            character_coverage=0.9995 if byte_fallback else 1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=max(len(line.encode()) for line in lines) + 1,
            user_defined_symbols=list(ROLE_MARKERS),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            pad_piece=PAD,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"SentencePiece could not train a vocabulary of {vocab_size} on {len(lines)} lines: {error}; "
            "a larger vocab_size or byte_fallback=True makes room for every character"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    model_file = folder / "tokenizer.model"
    model_file.write_bytes(written.getvalue())
    _hugging_face_twin(model_file, byte_fallback).save_pretrained(folder, save_jinja_files=False)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    # save_pretrained writes a class name that only transformers 5 knows; this one is known to all versions.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def _hugging_face_twin(model_file: Path, byte_fallback: bool) -> PreTrainedTokenizerFast:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    twin = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(pieces, vocab),
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    twin.normalizer = normalizers.Replace(" ", SPACE)
    twin.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    twin.add_special_tokens(
        [AddedToken(symbol, normalized=False, special=True) for symbol in (UNK, BOS, EOS, PAD, *ROLE_MARKERS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=twin,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MODEL_MAX_LENGTH,
    )


def _merges(pieces: sentencepiece.SentencePieceProcessor, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours that spell the best piece: all its splits, best piece first."""
    learned = {
        piece for piece, i in vocab.items() if not (pieces.is_control(i) or pieces.is_byte(i) or i == 0)
    }
    merges: list[tuple[str, str]] = []
    for piece in sorted(learned, key=lambda piece: -pieces.get_score(vocab[piece])):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges.extend(split for split in splits if split[0] in learned and split[1] in learned)
    return merges


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder; code inside the folder is never run.

    Raises:
        UserError: no such folder or no tokenizer in it, no chat template, or no end-of-sequence token.
    """
    tokenizer = _load(folder)
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer in {folder} has no chat template; add chat_template to its tokenizer_config.json"
        )
    return tokenizer


def _load(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise UserError(f"tokenizer folder {folder} does not exist; give a Hugging Face model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"no tokenizer could be loaded from {folder} ({error}); "
            "the folder needs tokenizer.json and tokenizer_config.json"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {folder} has no end-of-sequence token; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def tokens_with(tokenizer: PreTrainedTokenizerBase, strings: Iterable[str]) -> frozenset[int]:
    """Ids of the tokens whose text holds one of `strings`; special tokens do not count.

    Raises:
        UserError: there is none.
    """
    wanted = tuple(strings)
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    found = {token for token, text in enumerate(texts) if any(string in text for string in wanted)}
    ids = frozenset(found - set(tokenizer.all_special_ids))
    if not ids:
        raise UserError(
            f"no token of the vocabulary holds one of {list(wanted)}; name text that the data have"
        )
    return ids


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 over vocabulary, merges, special tokens and chat template: equal prints give equal ids.

    Raises:
        UserError: as `load_tokenizer`.
    """
    tokenizer = load_tokenizer(folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    identity = {
        "vocab": tokenizer.get_vocab(),
        "merges": state["model"].get("merges", []),
        "added_tokens": state["added_tokens"],
        "normalizer": state["normalizer"],
        "pre_tokenizer": state["pre_tokenizer"],
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
    }
    return _sha256(identity)


def encoding_fingerprint(folder: Path) -> str:
    """sha256 over what two models must share to exchange ids: pieces, merges and the end-of-sequence id.

    The chat template and the names of added tokens may differ, and there may be no template at all: only the
    policy's tokenizer turns text into ids.

    Raises:
        UserError: no such folder or no tokenizer in it, or no end-of-sequence token.
    """
    tokenizer = _load(folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added_ids = {token["id"] for token in state["added_tokens"]}
    pieces = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    identity = {
        "pieces": {piece: number for piece, number in pieces.items() if number not in added_ids},
        "merges": state["model"].get("merges", []),
        "eos_id": tokenizer.eos_token_id,
    }
    return _sha256(identity)


def _sha256(identity: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
