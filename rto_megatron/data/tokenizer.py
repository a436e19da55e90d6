"""Trains a SentencePiece tokenizer, writes it as a Hugging Face folder, loads and fingerprints folders.

The folder written here holds SentencePiece's own file and a tokenizer.json with the same pieces, and both give the
same ids. That is possible because the model adds no dummy prefix and normalises nothing: a space is the
meta symbol `▁`, and every other character stands for itself. A marker of the chat template is followed by
a space, so the first word of a message is the same piece as anywhere else, and the space belongs to the
answer: the prompt's ids are a prefix.

A folder with SentencePiece's file alone is encoded by SentencePiece itself. The converters of transformers 5
guess: they drop the dummy prefix or add one, skip the removal of extra spaces, take a unigram model for BPE, and
tokenizers' normaliser works on graphemes where SentencePiece's takes the longest match.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]  # protobuf makes them at run time
    ModelProto,
    TrainerSpec,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, SentencePieceBackend

from rto_megatron.data.soundness import require_vocabulary
from rto_megatron.errors import TokenizerError

SENTENCEPIECE_FILE = "tokenizer.model"
SPACE = "▁"
_TWINS = ("tokenizer.json", "vocab.json", "tekken.json")
UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
ASSISTANT_MARKER = "<|assistant|>"
ROLE_MARKERS = ("<|system|>", "<|user|>", ASSISTANT_MARKER)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + ('' if message['content'].startswith(' ') else ' ') + message['content'] }}"
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
        TokenizerError: the texts are empty, or hold more distinct characters than the vocabulary has room for.
    """
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise TokenizerError(
            "training a tokenizer needs text, and all the texts are empty; check the data files"
        )
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
        raise TokenizerError(
            f"SentencePiece could not train a vocabulary of {vocab_size} on {len(lines)} lines: {error}; "
            "a larger vocab_size or byte_fallback=True makes room for every character"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    model_file = folder / SENTENCEPIECE_FILE
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

    Where SentencePiece's tokenizer.model is the only vocabulary, every stretch of text between special tokens gets
    the ids that SentencePiece gives it; tokenizer_config.json's `legacy` and `add_prefix_space` are not applied.

    Raises:
        TokenizerError: no such folder or no tokenizer in it, no chat template, or no end-of-sequence token.
    """
    tokenizer = load_plain_tokenizer(folder)
    if tokenizer.chat_template is None:
        raise TokenizerError(
            f"the tokenizer in {folder} has no chat template; add chat_template to its tokenizer_config.json"
        )
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a vocabulary in the folder."""
    return any((folder / name).exists() for name in (SENTENCEPIECE_FILE, *_TWINS))


def has_sentencepiece_alone(folder: Path) -> bool:
    """Whether SentencePiece's tokenizer.model is the only vocabulary of the folder."""
    is_there = (folder / SENTENCEPIECE_FILE).is_file()
    return is_there and not any((folder / name).exists() for name in _TWINS)


def load_plain_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads what `load_tokenizer` does for a model that may have no chat template, as a base model or a reward model.

    Raises:
        TokenizerError: no such folder or no tokenizer in it, an empty vocabulary, or no end-of-sequence token.
    """
    if not folder.is_dir():
        raise TokenizerError(f"tokenizer folder {folder} does not exist; give a Hugging Face model folder")
    tokenizer: PreTrainedTokenizerBase
    try:
        if has_sentencepiece_alone(folder):
            tokenizer = _load_sentencepiece(folder)
        elif (folder / "tokenizer.json").is_file():
            # Not by the class that the folder names: transformers 5 builds some of them, such as LlamaTokenizer, anew
            # from the pieces alone, and a normaliser of the file is lost without a word.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        else:
            # Its module brings generation, and with it scikit-learn and pandas where they are installed: seconds.
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise TokenizerError(
            f"no tokenizer could be loaded from {folder} ({error}); "
            f"the folder needs tokenizer.json and tokenizer_config.json, or SentencePiece's {SENTENCEPIECE_FILE}"
        ) from error
    require_vocabulary(tokenizer, folder)
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"the tokenizer in {folder} has no end-of-sequence token; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


class _SentencePieceTokenizer(SentencePieceBackend):
    """transformers' wrapper of SentencePiece, with ids and text that are SentencePiece's own."""

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        # The surface of an unknown stretch could spell a piece, so the way to the pieces leads over ids.
        return [self.sp_model.id_to_piece(number) for number in self.sp_model.encode(text)]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        added = self.added_tokens_encoder
        stretches = groupby(tokens, key=lambda token: token in added)
        return "".join(
            "".join(part) if is_added else self.sp_model.decode(list(part)) for is_added, part in stretches
        )


def _load_sentencepiece(folder: Path) -> _SentencePieceTokenizer:
    model_file = folder / SENTENCEPIECE_FILE
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    except RuntimeError as error:
        raise TokenizerError(
            f"{model_file} is no SentencePiece model ({error}); Llama 3's is a tiktoken file: "
            "use a folder that has tokenizer.json"
        ) from error
    # Given here so that tokenizer_config.json cannot set them: sp_model_kwargs may ask for sampled ids.
    tokenizer: _SentencePieceTokenizer = _SentencePieceTokenizer.from_pretrained(
        folder, local_files_only=True, legacy=True, sp_model_kwargs={}, special_tokens_pattern="none"
    )
    control = [
        pieces.id_to_piece(i) for i in range(len(pieces)) if pieces.is_control(i) or pieces.is_unknown(i)
    ]
    known = tokenizer.added_tokens_encoder
    tokenizer.add_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in control if piece not in known],
        special_tokens=True,
    )
    own = {
        "unk_token": pieces.unk_id(),
        "bos_token": pieces.bos_id(),
        "eos_token": pieces.eos_id(),
        "pad_token": pieces.pad_id(),
    }
    missing = own.keys() - tokenizer.special_tokens_map.keys()
    tokenizer.add_special_tokens({name: pieces.id_to_piece(own[name]) for name in missing if own[name] >= 0})
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    # Llama's class begins every text with <s> unless it is told not to.
    is_llama = str(config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer"
    if config.get("add_bos_token", is_llama) and tokenizer.bos_token_id is not None:
        tokenizer.special_tokens_pattern = "bos"
    return tokenizer


def tokens_with(tokenizer: PreTrainedTokenizerBase, strings: Iterable[str]) -> frozenset[int]:
    """Ids of the tokens whose text holds one of `strings`; special tokens do not count.

    Raises:
        TokenizerError: there is none.
    """
    wanted = tuple(strings)
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    found = {token for token, text in enumerate(texts) if any(string in text for string in wanted)}
    ids = frozenset(found - set(tokenizer.all_special_ids))
    if not ids:
        raise TokenizerError(
            f"no token of the vocabulary holds one of {list(wanted)}; name text that the data have"
        )
    return ids


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 over vocabulary, merges, special tokens and chat template: equal prints give equal ids.

    Folders of one SentencePiece model with and without its tokenizer.json have different prints.

    Raises:
        UserError: as `load_tokenizer`.
    """
    tokenizer = load_tokenizer(folder)
    identity: dict[str, object] = {
        "vocab": tokenizer.get_vocab(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
    }
    if isinstance(tokenizer, _SentencePieceTokenizer):
        model = tokenizer.sp_model.serialized_model_proto()
        return _sha256({**identity, "sentencepiece": hashlib.sha256(model).hexdigest()})
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    identity |= {
        "merges": state["model"].get("merges", []),
        "added_tokens": state["added_tokens"],
        "normalizer": state["normalizer"],
        "pre_tokenizer": state["pre_tokenizer"],
    }
    return _sha256(identity)


def encoding_fingerprint(folder: Path) -> str:
    """sha256 over what two models must share to exchange ids: pieces, merges or scores, the end-of-sequence id.

    The chat template and the names of added tokens may differ, and there may be no template at all: only the
    policy's tokenizer turns text into ids. A SentencePiece model has one print with and without a tokenizer.json
    of the same pieces.

    Raises:
        UserError: no such folder or no tokenizer in it, or no end-of-sequence token.
    """
    tokenizer = load_plain_tokenizer(folder)
    if isinstance(tokenizer, _SentencePieceTokenizer):
        vocab, merges, scores, added = _sentencepiece_parts(tokenizer)
    else:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        added = {token["id"] for token in state["added_tokens"]}
        vocab = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        merges = [(left, right) for left, right in state["model"].get("merges", [])]
        scores = state["model"]["vocab"] if state["model"]["type"] == "Unigram" else []
    pieces = {piece: number for piece, number in vocab.items() if number not in added}
    joins = (pair for pair in merges if {*pair, "".join(pair)} <= pieces.keys())
    identity = {
        "pieces": pieces,
        # Converters order the splits of one piece differently.
        "merges": [sorted(splits) for _, splits in groupby(joins, key="".join)],
        "scores": {piece: f"{score:.5g}" for piece, score in scores if piece in pieces},
        "eos_id": tokenizer.eos_token_id,
    }
    return _sha256(identity)


def _sentencepiece_parts(
    tokenizer: _SentencePieceTokenizer,
) -> tuple[dict[str, int], Sequence[tuple[str, str]], Sequence[tuple[str, float]], set[int]]:
    """Vocabulary, merges, scores and ids of added tokens, as the model's tokenizer.json would hold them."""
    proto = ModelProto.FromString(tokenizer.sp_model.serialized_model_proto())
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    symbols = {
        i for i, piece in enumerate(proto.pieces) if piece.type == ModelProto.SentencePiece.USER_DEFINED
    }
    added = {*tokenizer.added_tokens_encoder.values(), *symbols}
    if proto.trainer_spec.model_type == TrainerSpec.BPE:
        return vocab, _merges(tokenizer.sp_model, vocab), [], added
    return vocab, [], [(piece.piece, piece.score) for piece in proto.pieces], added


def _sha256(identity: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
