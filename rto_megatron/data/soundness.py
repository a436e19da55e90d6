"""Whether token ids say what the text says: a tokenizer that lost its vocabulary turns every text into nothing."""

from collections.abc import Collection, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rto_megatron.errors import DataError, TokenizerError

NUM_GIVEN_BACK = 32  # texts of a source that a byte-level tokenizer must give back


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
        DataError: half of a character stands in it, which no tokenizer takes and no file can hold.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - 20) : error.start]
        raise DataError(
            f"{where}: the text holds a lone surrogate, \\u{ord(text[error.start]):04x}, behind {before!r}: half of a "
            "character that was cut in two; remove it, or write the whole character"
        ) from error
    return text


class TokenizerJudge:
    """Judges a tokenizer by the texts that a run gives it, each with the ids that it made of them.

    Example:
        TokenizerJudge(tokenizer).judge("hello", ids, where="prompts.jsonl:1")
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._marks = frozenset([*special, *tokenizer.all_special_ids])
        self._end = frozenset([tokenizer.eos_token_id])
        self._unk_id = tokenizer.unk_token_id
        self._added = tuple(tokenizer.added_tokens_encoder)
        self._byte_level = tokenizer.backend_tokenizer if _is_byte_level(tokenizer) else None
        self._num_given_back = 0

    def judge(self, text: str, ids: Sequence[int], where: str) -> None:
        """Refuses ids that hold nothing of a text, and a byte-level tokenizer that does not give the text back.

        Args:
            text: may be blank, and then has nothing to lose.
            ids: of the text, with the special tokens that a template puts around it.
            where: the row that the text stands in.

        Raises:
            UserError: every id is special or unknown.
            TokenizerError: the text does not come back.
        """
        self._require_meaning(text, ids, self._marks, where)
        if self._byte_level is not None and self._num_given_back < NUM_GIVEN_BACK:
            self._num_given_back += 1
            self._require_round_trip(self._byte_level, text, where)

    def judge_answer(self, text: str, ids: Sequence[int], where: str) -> None:
        """Judges as `judge` does; but an answer may be a special token other than the end of the sequence."""
        self._require_meaning(text, ids, self._end, where)

    def _require_meaning(self, text: str, ids: Sequence[int], marks: Collection[int], where: str) -> None:
        if not text.strip() or any(token != self._unk_id and token not in marks for token in ids):
            return
        is_unknown = self._unk_id is not None and self._unk_id in ids
        became = "nothing but unknown tokens" if is_unknown else "no token at all"
        raise DataError(
            f"{where}: the tokenizer makes {became} of {text!r:.60}; it lacks the vocabulary of this text: take the "
            "tokenizer that belongs to the model, or remove the row"
        )

    def _require_round_trip(self, backend: Tokenizer, text: str, where: str) -> None:
        if any(token in text for token in self._added):
            return  # such a token may swallow the spaces beside it
        expected = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        back = backend.decode(backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        if back.removeprefix(" ") != expected.removeprefix(" "):  # some put a space before every text
            raise TokenizerError(
                f"{where}: the tokenizer is byte-level, and yet {text!r:.60} comes back from its ids as {back!r:.60}; "
                "its vocabulary, merges or decoder do not belong together: take its files from the model's publisher"
            )


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it spells text as bytes, as GPT-2's and Qwen's do: such a one can lose no character."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    backend = tokenizer.backend_tokenizer
    return any("ByteLevel" in repr(part) for part in (backend.pre_tokenizer, backend.decoder))
