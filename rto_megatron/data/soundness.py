"""Whether token ids say what the text says: a tokenizer that lost its vocabulary turns every text into nothing."""

from collections.abc import Collection, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rto_megatron.errors import UserError


class TokenizerError(UserError):
    """The tokenizer is not sound, whatever row it was seen on."""


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuses a tokenizer that knows nothing but its added tokens.

    Raises:
        TokenizerError: transformers builds such a one of a tokenizer_config.json alone.
    """
    if not tokenizer.get_vocab().keys() - tokenizer.added_tokens_encoder.keys():
        raise TokenizerError(
            f"the tokenizer in {folder} has an empty vocabulary: it knows {len(tokenizer)} special tokens and turns "
            "every text into nothing; put tokenizer.json (or vocab.json and merges.txt, or tokenizer.model) of the "
            "model beside tokenizer_config.json"
        )


def require_characters(text: str, where: str) -> str:
    """The text itself.

    Raises:
        UserError: half of a character stands in it, which no tokenizer takes and no file can hold.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - 20) : error.start]
        raise UserError(
            f"{where}: the text holds a lone surrogate, \\u{ord(text[error.start]):04x}, behind {before!r}: half of a "
            "character that was cut in two; remove it, or write the whole character"
        ) from error
    return text


def require_meaning(
    text: str, ids: Sequence[int], marks: Collection[int], unk_id: int | None, where: str
) -> None:
    """Refuses ids that hold nothing of a text.

    Args:
        text: may be empty, and then has nothing to lose.
        ids: of the text, with what the template puts around it.
        marks: ids that stand for no text: those of special tokens.
        unk_id: of the unknown token; None where the tokenizer has none.

    Raises:
        UserError: every id is a mark, or unknown.
    """
    if not text.strip() or any(token != unk_id and token not in marks for token in ids):
        return
    is_unknown = unk_id is not None and unk_id in ids
    became = "nothing but unknown tokens" if is_unknown else "no token at all"
    raise UserError(
        f"{where}: the tokenizer makes {became} of {text!r:.60}; it lacks the vocabulary of this text: take the "
        "tokenizer that belongs to the model, or remove the row"
    )


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it spells text as bytes, as GPT-2's and Qwen's do: such a one can lose no character."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    backend = tokenizer.backend_tokenizer
    return any("ByteLevel" in repr(part) for part in (backend.pre_tokenizer, backend.decoder))


def require_round_trip(tokenizer: PreTrainedTokenizerFast, text: str, where: str) -> None:
    """Refuses a byte-level tokenizer that does not give a text back.

    A text that spells an added token is not judged, as such a token may swallow the spaces beside it.

    Raises:
        TokenizerError: its vocabulary, merges or decoder do not belong together.
    """
    if any(token in text for token in tokenizer.added_tokens_encoder):
        return
    backend = tokenizer.backend_tokenizer
    expected = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    back = backend.decode(backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
    if back.removeprefix(" ") != expected.removeprefix(" "):  # some put a space before every text
        raise TokenizerError(
            f"{where}: the tokenizer is byte-level, and yet {text!r:.60} comes back from its ids as {back!r:.60}; its "
            "vocabulary, merges or decoder do not belong together: take its files from the model's publisher"
        )
