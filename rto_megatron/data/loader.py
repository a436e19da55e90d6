"""Reads prompts, preference pairs, demonstrations, verdicts and texts in the public layouts and tokenizes them.

Layouts, by column names:
    prompts         context_messages [{role, content}]; or prompt, a string or a list of messages
    pairs           chosen and rejected [{role, content}], as in ultrafeedback_binarized; optional prompt_id,
                    and margin, or score_chosen and score_rejected (their difference is the margin)
    demonstrations  messages [{role, content}]; or chosen, as above; or prompt and response strings. The
                    last message is the target, everything before it is the prompt
    verdicts        prompt, completion (strings or messages) and label (true or false); or pairs, as above
    texts           text, a string

An answer that does not fit in `max_length` is cut, and the last token that is kept becomes the
end-of-sequence token, because the reward model reads its score there. Whatever was dropped or cut is counted
in the `LoadReport`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rto_megatron.data.chat import Exchange, Message, encode_exchange, encode_prompt, encode_text
from rto_megatron.data.sources import Row, read_rows
from rto_megatron.errors import UserError
from rto_megatron.types import Demonstration, JudgedResponse, PreferencePair, Prompt

MIN_ANSWER_TOKENS = 2  # an answer of one token would be nothing but the end of the sequence


@dataclass(frozen=True)
class Limits:
    """Length limits in tokens, and what happens to a prompt over its limit."""

    max_prompt_tokens: int
    max_length: int  # prompt and answer together; prompts without answers ignore it
    overlong: Literal["error", "drop", "truncate_left"]

    def __post_init__(self) -> None:
        if self.max_length <= MIN_ANSWER_TOKENS:
            raise UserError(
                f"data.max_length = {self.max_length} leaves no room for a prompt and an answer of "
                f"{MIN_ANSWER_TOKENS} tokens; raise it"
            )


@dataclass(frozen=True)
class LoadReport:
    """What became of the rows of one source; all but `source` are counts."""

    source: str
    rows: int
    kept: int
    dropped: int  # rows whose prompt was over the limit, and texts of one token
    truncated_prompts: int
    truncated_answers: int
    answers_cut_at_eos: int  # answers whose text spelt the end-of-sequence token before its end
    identical_pairs: int  # pairs whose two answers are the same ids: kept, but they teach nothing

    def summary(self) -> str:
        """One line: rows read and kept, and every other count that is not zero."""
        counts = list(asdict(self).items())[3:]
        others = [f"{count} {name.replace('_', ' ')}" for name, count in counts if count]
        return ", ".join([f"{self.source}: {self.rows} rows read", f"{self.kept} kept", *others])


@dataclass(frozen=True)
class Loaded[T]:
    """Items in the order of the file, and the report."""

    items: tuple[T, ...]
    report: LoadReport


def load_prompts(
    source: str, tokenizer: PreTrainedTokenizerBase, limits: Limits, max_rows: int | None = None
) -> Loaded[Prompt]:
    """Load prompts for rollouts.

    Args:
        source: see `sources.read_rows`.
        tokenizer: the policy's, with a chat template.
        limits: only `max_prompt_tokens` and `overlong` matter here.
        max_rows: rows to read; None for all.

    Raises:
        UserError: a row is not in a known layout, a prompt is too long under "error", or no row is left.
    """
    encoder = _Encoder(tokenizer, limits)

    def convert(row: Row) -> Prompt | None:
        column = _first_column(row, ("context_messages", "prompt"), "prompts")
        messages = _prompt_messages(row, column)
        ids = encode_prompt(tokenizer, messages, row.where)
        kept = encoder.limited_prompt(row, ids, limits.max_prompt_tokens)
        return None if kept is None else Prompt(_row_id(row), kept)

    return _load(source, convert, encoder, max_rows)


def load_pairs(
    source: str, tokenizer: PreTrainedTokenizerBase, limits: Limits, max_rows: int | None = None
) -> Loaded[PreferencePair]:
    """Load preference pairs; arguments and errors as `load_prompts`."""
    encoder = _Encoder(tokenizer, limits)

    def convert(row: Row) -> PreferencePair | None:
        chosen = _conversation(row, "chosen")
        rejected = _conversation(row, "rejected")
        if chosen[:-1] != rejected[:-1]:
            raise UserError(
                f"{row.where}: chosen and rejected do not answer the same prompt; "
                "all messages but the last have to be equal"
            )
        chosen_exchange = encoder.example(row, chosen)
        rejected_exchange = encoder.example(row, rejected)
        if chosen_exchange is None or rejected_exchange is None:
            return None
        encoder.counts["identical_pairs"] += chosen_exchange.answer_ids == rejected_exchange.answer_ids
        return PreferencePair(
            id=_row_id(row),
            prompt_ids=chosen_exchange.prompt_ids,
            chosen_ids=chosen_exchange.answer_ids,
            rejected_ids=rejected_exchange.answer_ids,
            margin=_margin(row),
        )

    return _load(source, convert, encoder, max_rows)


def load_demonstrations(
    source: str, tokenizer: PreTrainedTokenizerBase, limits: Limits, max_rows: int | None = None
) -> Loaded[Demonstration]:
    """Load supervised examples; arguments and errors as `load_prompts`."""
    encoder = _Encoder(tokenizer, limits)

    def convert(row: Row) -> Demonstration | None:
        column = _first_column(row, ("messages", "chosen", "response"), "demonstrations")
        if column == "response":
            messages = [*_prompt_messages(row, "prompt"), Message("assistant", _text(row, "response"))]
        else:
            messages = _conversation(row, column)
        exchange = encoder.example(row, messages)
        if exchange is None:
            return None
        return Demonstration(_row_id(row), exchange.prompt_ids, exchange.answer_ids)

    return _load(source, convert, encoder, max_rows)


def load_judged(
    source: str, tokenizer: PreTrainedTokenizerBase, limits: Limits, max_rows: int | None = None
) -> Loaded[JudgedResponse]:
    """Load answers with verdicts: rows of prompt, completion and label, or preference pairs, two answers each.

    The unrelated answer of each is the first one of the nearest row before it that has another prompt.
    Arguments and errors as `load_prompts`.
    """
    encoder = _Encoder(tokenizer, limits)

    def convert(row: Row) -> tuple[JudgedResponse, ...] | None:
        if "label" in row.columns:
            verdicts = [(_completed(row), _label(row))]
        else:
            _first_column(row, ("chosen", "label"), "answers with verdicts")
            verdicts = [(_conversation(row, "chosen"), True), (_conversation(row, "rejected"), False)]
        answers = []
        for messages, is_desirable in verdicts:
            exchange = encoder.example(row, messages)
            if exchange is None:
                return None
            answers.append(
                JudgedResponse(_row_id(row), exchange.prompt_ids, exchange.answer_ids, is_desirable, ())
            )
        return tuple(answers)

    loaded = _load(source, convert, encoder, max_rows)
    rows = loaded.items
    answers = []
    for index, row in enumerate(rows):
        others = (rows[index - back][0] for back in range(1, len(rows)))
        other = next((one for one in others if one.prompt_ids != row[0].prompt_ids), None)
        if other is None:
            raise UserError(f"{source}: all rows answer one prompt; the KL baseline of KTO needs another one")
        for answer in row:
            room = limits.max_length - len(answer.prompt_ids)
            answers.append(replace(answer, unrelated_ids=_fitted(other.response_ids, room)))
    return Loaded(tuple(answers), loaded.report)


def _completed(row: Row) -> list[Message]:
    if isinstance(row.columns.get("completion"), list):
        answer = _messages(row, "completion")[-1].content
    else:
        answer = _text(row, "completion")
    return [*_prompt_messages(row, "prompt"), Message("assistant", answer)]


def _label(row: Row) -> bool:
    label = row.columns["label"]
    if not isinstance(label, bool):
        raise UserError(f"{row.where}: column 'label' is {label!r:.60}, expected true or false")
    return label


def _fitted(answer_ids: tuple[int, ...], room: int) -> tuple[int, ...]:
    return answer_ids if len(answer_ids) <= room else (*answer_ids[: room - 1], answer_ids[-1])


def load_texts(source: str, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Loaded[Demonstration]:
    """Load texts of column `text` for a language-model loss on every token but the first.

    Longer texts than `max_length` are cut; rows of fewer than two tokens are dropped.

    Raises:
        UserError: a row has no text, or no row is left.
    """
    encoder = _Encoder(tokenizer, limits)

    def convert(row: Row) -> Demonstration | None:
        _first_column(row, ("text",), "texts")
        ids = encode_text(tokenizer, _text(row, "text"))
        if len(ids) > limits.max_length:
            encoder.counts["truncated_answers"] += 1
            ids = ids[: limits.max_length]
        return None if len(ids) < 2 else Demonstration(_row_id(row), ids[:1], ids[1:])

    return _load(source, convert, encoder, None, "of fewer than two tokens")


def _load[T](
    source: str,
    convert: Callable[[Row], T | None],
    encoder: "_Encoder",
    max_rows: int | None,
    dropped_as: str | None = None,
) -> Loaded[T]:
    items = []
    num_rows = 0
    for row in islice(read_rows(source), max_rows):
        num_rows += 1
        item = convert(row)
        if item is not None:
            items.append(item)
    counts = encoder.counts
    report = LoadReport(
        source=source,
        rows=num_rows,
        kept=len(items),
        dropped=num_rows - len(items),
        truncated_prompts=counts["truncated_prompts"],
        truncated_answers=counts["truncated_answers"],
        answers_cut_at_eos=counts["answers_cut_at_eos"],
        identical_pairs=counts["identical_pairs"],
    )
    if not items:
        limit = encoder.limits.max_prompt_tokens
        reason = dropped_as or f"with a prompt over its limit; check data.max_prompt_tokens ({limit})"
        raise UserError(f"{source}: no rows to use; {num_rows} read, {report.dropped} dropped {reason}")
    return Loaded(tuple(items), report)


@dataclass(frozen=True)
class _Encoder:
    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    counts: Counter[str] = field(default_factory=Counter)

    def limited_prompt(self, row: Row, ids: tuple[int, ...], limit: int) -> tuple[int, ...] | None:
        if len(ids) <= limit:
            return ids
        if self.limits.overlong == "drop":
            return None
        if self.limits.overlong == "error":
            raise UserError(
                f"{row.where}: the prompt has {len(ids)} tokens, over the limit of {limit}; raise "
                "data.max_prompt_tokens (and data.max_length), or set data.overlong to drop or truncate_left"
            )
        self.counts["truncated_prompts"] += 1
        has_bos = ids[0] == self.tokenizer.bos_token_id
        return (ids[0], *ids[len(ids) - limit + 1 :]) if has_bos else ids[-limit:]

    def example(self, row: Row, messages: Sequence[Message]) -> Exchange | None:
        exchange = encode_exchange(self.tokenizer, messages[:-1], messages[-1].content, row.where)
        limit = min(self.limits.max_prompt_tokens, self.limits.max_length - MIN_ANSWER_TOKENS)
        prompt_ids = self.limited_prompt(row, exchange.prompt_ids, limit)
        if prompt_ids is None:
            return None
        self.counts["answers_cut_at_eos"] += exchange.num_cut_tokens > 0
        room = self.limits.max_length - len(prompt_ids)
        self.counts["truncated_answers"] += len(exchange.answer_ids) > room
        return Exchange(prompt_ids, _fitted(exchange.answer_ids, room), exchange.num_cut_tokens)


def _row_id(row: Row) -> str:
    """The row's own id, else its place in the source."""
    for column in ("prompt_id", "id"):
        if column in row.columns:
            return str(row.columns[column])
    return row.where


def _first_column(row: Row, candidates: Sequence[str], what: str) -> str:
    for column in candidates:
        if column in row.columns:
            return column
    raise UserError(
        f"{row.where}: found the columns {sorted(row.columns)}, "
        f"expected one of {list(candidates)} for {what}; rename a column"
    )


def _text(row: Row, column: str) -> str:
    value = row.columns.get(column)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{row.where}: column {column!r} is {value!r:.60}, expected text that is not empty")
    return value


def _messages(row: Row, column: str) -> list[Message]:
    value = row.columns.get(column)
    expected = "expected a list of messages {'role': ..., 'content': ...}"
    if column not in row.columns:
        raise UserError(f"{row.where}: column {column!r} is missing, found {sorted(row.columns)}; {expected}")
    if not isinstance(value, list) or not value:
        raise UserError(f"{row.where}: column {column!r} is {value!r:.60}; {expected}")
    messages = []
    for number, turn in enumerate(value):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{row.where}: message {number} of {column!r} is {turn!r:.60}; {expected}")
        if not content.strip():
            raise UserError(f"{row.where}: message {number} ({role}) of {column!r} is empty; remove the row")
        messages.append(Message(role, content))
    return messages


def _prompt_messages(row: Row, column: str) -> list[Message]:
    if column == "prompt" and not isinstance(row.columns.get(column), list):
        return [Message("user", _text(row, column))]
    messages = _messages(row, column)
    if messages[-1].role == "assistant":
        raise UserError(
            f"{row.where}: {column!r} ends with an assistant message; a prompt has to end before the answer"
        )
    return messages


def _conversation(row: Row, column: str) -> list[Message]:
    messages = _messages(row, column)
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise UserError(
            f"{row.where}: {column!r} has the roles {[message.role for message in messages]}; "
            "expected a prompt and a last message of the assistant"
        )
    return messages


def _margin(row: Row) -> float:
    columns = row.columns
    if "margin" in columns:
        return _number(row, "margin")
    if "score_chosen" in columns and "score_rejected" in columns:
        return _number(row, "score_chosen") - _number(row, "score_rejected")
    return 0.0


def _number(row: Row, column: str) -> float:
    value = row.columns[column]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{row.where}: column {column!r} is {value!r:.60}, expected a number")
    return float(value)
