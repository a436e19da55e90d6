"""Rows of a source become token ids within length limits; what was dropped or cut is counted."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import islice
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rto_megatron.config import schema
from rto_megatron.config.facts import facts_of
from rto_megatron.config.inputs import ExampleDataConfig
from rto_megatron.data.bad_rows import BadRows
from rto_megatron.data.chat import Exchange, encode_exchange, encode_prompt, encode_text
from rto_megatron.data.messages import Message
from rto_megatron.data.soundness import TokenizerJudge, require_characters
from rto_megatron.data.sources import BadRow, Row, scan_rows
from rto_megatron.data.template import ChatTemplate, TemplateOptions
from rto_megatron.data.turns import conversation_of
from rto_megatron.errors import DataError, RecipeError, TokenizerError, UserError
from rto_megatron.types import EndOfSequence

_REASONS = 3  # why rows were bad, in a report
MIN_ANSWER_TOKENS = 2  # an answer of one token would be nothing but the end of the sequence


@dataclass(frozen=True)
class Limits:
    """Length limits in tokens, what happens to a prompt over its limit and to a row that cannot be used, and how
    conversations are rendered.

    Example:
        Limits(max_prompt_tokens=512, max_length=1024, overlong="drop")
    """

    max_prompt_tokens: int
    max_length: int  # prompt and answer together; prompts without answers ignore it
    overlong: Literal["error", "drop", "truncate_left"]
    bad_rows: Literal["error", "drop"] = "error"
    template: TemplateOptions = field(default_factory=TemplateOptions)

    def __post_init__(self) -> None:
        if self.max_length <= MIN_ANSWER_TOKENS:
            raise RecipeError(
                f"data.max_length = {self.max_length} leaves no room for a prompt and an answer of "
                f"{MIN_ANSWER_TOKENS} tokens; raise it"
            )


def limits_of(config: schema.Stage, moment: datetime | None = None) -> Limits:
    """What a stage takes of its data; prompts that are to be answered leave room for the response.

    Args:
        moment: of the run's start; None: templates that print the date print today's.
    """
    data = config.data
    template = TemplateOptions(data.template, moment)
    length, _ = facts_of(config).longest_sequence
    if isinstance(data, ExampleDataConfig):
        template = TemplateOptions(data.template, moment, data.open_thought, data.allow_non_prefix)
    return Limits(data.max_prompt_tokens, length, data.overlong, data.bad_rows, template)


@dataclass(frozen=True)
class LoadReport:
    """What became of the rows of one source; all but `source` and `reasons` are counts.

    Example:
        print(report.summary())
    """

    source: str
    rows: int
    kept: int
    dropped: int  # rows whose prompt was over the limit, and texts of one token
    truncated_prompts: int
    truncated_answers: int
    truncated_answers_closed: int  # of these, those whose last kept token became end-of-sequence
    answers_cut_at_eos: int  # answers whose text spelt the end-of-sequence token before its end
    identical_pairs: int  # pairs whose two answers are the same ids: kept, but they teach nothing
    earlier_thoughts_left_out: int  # reasoning of turns before an answer that the template does not render
    answers_joined_apart: int  # answers whose rendered prompt is not how the rendered conversation begins
    thoughts_left_open: int  # answers that do not close the thought that the prompt opens
    pairs_without_margin: int  # where margins are read: kept, with margin 0
    bad_rows: int  # rows that could not be used, left out
    reasons: tuple[str, ...]  # why, of the first bad rows

    def summary(self) -> str:
        """One line: rows read and kept, and every other count that is not zero; below it, why rows were bad."""
        counts = [(name, count) for name, count in list(asdict(self).items())[3:] if isinstance(count, int)]
        others = [f"{count} {name.replace('_', ' ')}" for name, count in counts if count]
        line = ", ".join([f"{self.source}: {self.rows} rows read", f"{self.kept} kept", *others])
        return "\n  ".join([line, *self.reasons])


@dataclass(frozen=True)
class Loaded[T]:
    """Items in the order of the file, and the report.

    Example:
        num_examples = len(loaded.items)
    """

    items: tuple[T, ...]
    report: LoadReport


class OverlongError(DataError):
    """A prompt over its limit, where that is an error whatever happens to bad rows."""


@dataclass(frozen=True)
class Encoder:
    """Turns what rows say into ids, and counts what becomes of them.

    Example:
        Encoder(tokenizer, limits).prompt(row, messages)
    """

    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    eos: EndOfSequence | None = None  # what ends an answer; None: the tokenizer's alone
    closes_cut_answers: bool = True  # else nothing says that a cut answer is over
    counts: Counter[str] = field(default_factory=Counter)

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's."""
        return ChatTemplate(self.tokenizer, self.limits.template)

    @cached_property
    def _judge(self) -> TokenizerJudge:
        return TokenizerJudge(self.tokenizer)

    def prompt(self, row: Row, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of a conversation that waits for an answer, of any length."""
        asked = conversation_of(row, messages)
        prompt = encode_prompt(self.template, asked, row.where)
        self.counts["earlier_thoughts_left_out"] += prompt.num_thoughts_left_out
        self._judge.judge(asked.text, prompt.ids, row.where)
        return prompt.ids

    def text(self, row: Row, text: str) -> tuple[int, ...]:
        """Ids of a text without roles, of any length."""
        ids = encode_text(self.tokenizer, require_characters(text, row.where))
        self._judge.judge(text, ids, row.where)
        return ids

    def limited_prompt(self, row: Row, ids: tuple[int, ...], limit: int) -> tuple[int, ...] | None:
        if len(ids) <= limit:
            return ids
        if self.limits.overlong == "drop":
            return None
        if self.limits.overlong == "error":
            raise OverlongError(
                f"{row.where}: the prompt has {len(ids)} tokens, over the limit of {limit}; raise "
                "data.max_prompt_tokens (and data.max_length), or set data.overlong to drop or truncate_left"
            )
        self.counts["truncated_prompts"] += 1
        has_bos = ids[0] == self.tokenizer.bos_token_id
        return (ids[0], *ids[len(ids) - limit + 1 :]) if has_bos else ids[-limit:]

    def example(self, row: Row, messages: Sequence[Message]) -> Exchange | None:
        conversation = conversation_of(row, messages)
        exchange = encode_exchange(self.template, conversation, row.where, self.eos)
        self._judge.judge(conversation.prompt.text, exchange.prompt_ids, row.where)
        if not exchange.num_cut_tokens:
            self._judge.judge_answer(messages[-1].content, exchange.answer_ids, row.where)
        limit = min(self.limits.max_prompt_tokens, self.limits.max_length - MIN_ANSWER_TOKENS)
        prompt_ids = self.limited_prompt(row, exchange.prompt_ids, limit)
        if prompt_ids is None:
            return None
        self.counts["answers_cut_at_eos"] += exchange.num_cut_tokens > 0
        self.counts["earlier_thoughts_left_out"] += exchange.num_thoughts_left_out
        self.counts["answers_joined_apart"] += exchange.is_apart
        self.counts["thoughts_left_open"] += exchange.is_open
        room = self.limits.max_length - len(prompt_ids)
        is_cut = len(exchange.answer_ids) > room
        self.counts["truncated_answers"] += is_cut
        self.counts["truncated_answers_closed"] += is_cut and self.closes_cut_answers
        return replace(exchange, prompt_ids=prompt_ids, answer_ids=self.fitted(exchange.answer_ids, room))

    def fitted(self, answer_ids: tuple[int, ...], room: int) -> tuple[int, ...]:
        """The answer, cut to `room` tokens where it is longer; then the last one is the tokenizer's end-of-sequence,
        or whatever stood there."""
        if len(answer_ids) <= room:
            return answer_ids
        if not self.closes_cut_answers:
            return answer_ids[:room]
        return (*answer_ids[: room - 1], self.tokenizer.eos_token_id)


def load_rows[T](
    source: str,
    convert: Callable[[Row], T | None],
    encoder: "Encoder",
    max_rows: int | None,
    dropped_as: str | None = None,
) -> Loaded[T]:
    """Converts the rows of a source; `convert` returns None for a row that is dropped.

    Raises:
        UserError: the source or the tokenizer is not sound; or names all rows that cannot be used, unless they are
        dropped; or no row is left.
    """
    items = []
    num_rows = 0
    bad, overlong = BadRows(), BadRows()
    for row in islice(scan_rows(source), max_rows):
        num_rows += 1
        try:
            item = convert(_sound(row))
        except TokenizerError:
            raise
        except OverlongError as error:
            overlong.add(row.where, str(error))
        except UserError as error:
            bad.add(row.where, str(error))
        else:
            if item is not None:
                items.append(item)
    refuse_rows(source, num_rows, bad if encoder.limits.bad_rows == "error" else BadRows(), overlong)
    counts = encoder.counts
    report = LoadReport(
        source=source,
        rows=num_rows,
        kept=len(items),
        dropped=num_rows - len(items) - bad.number,
        truncated_prompts=counts["truncated_prompts"],
        truncated_answers=counts["truncated_answers"],
        truncated_answers_closed=counts["truncated_answers_closed"],
        answers_cut_at_eos=counts["answers_cut_at_eos"],
        identical_pairs=counts["identical_pairs"],
        earlier_thoughts_left_out=counts["earlier_thoughts_left_out"],
        answers_joined_apart=counts["answers_joined_apart"],
        thoughts_left_open=counts["thoughts_left_open"],
        pairs_without_margin=counts["pairs_without_margin"],
        bad_rows=bad.number,
        reasons=tuple(bad.told(limit=_REASONS)),
    )
    if not items:
        _refuse_nothing(report, encoder.limits.max_prompt_tokens, dropped_as)
    return Loaded(tuple(items), report)


def _sound(row: Row | BadRow) -> Row:
    if isinstance(row, BadRow):
        raise DataError(row.problem)
    return row


def refuse_rows(source: str, num_rows: int, bad: BadRows, overlong: BadRows | None = None) -> None:
    """Does nothing without such rows.

    Raises:
        DataError: names all of them.
    """
    overlong = overlong or BadRows()
    if not bad.number and not overlong.number:
        return
    heading = f"{source}: {bad.number + overlong.number} of the {num_rows} rows that were read cannot be used"
    if 0 < bad.number < num_rows:
        heading += "; mend them, or set data.bad_rows=drop to go on without them"
    raise DataError("\n  ".join([f"{heading}:", *bad.told(), *overlong.told()]))


def _refuse_nothing(report: LoadReport, max_prompt_tokens: int, dropped_as: str | None) -> None:
    if not report.rows:
        raise DataError(f"{report.source} holds no row; write it again, or name another file")
    reasons = []
    if report.dropped:
        why = (
            dropped_as or f"with a prompt over its limit; check data.max_prompt_tokens ({max_prompt_tokens})"
        )
        reasons.append(f"{report.dropped} dropped {why}")
    if report.bad_rows:
        reasons.append("\n  ".join([f"{report.bad_rows} bad:", *report.reasons]))
    raise DataError(f"{report.source}: no rows to use; {report.rows} read, {', '.join(reasons)}")
