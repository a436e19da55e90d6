"""Rows of a source become token ids within length limits; what was dropped or cut is counted."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rto_megatron.data.chat import Exchange, Message, encode_exchange
from rto_megatron.data.sources import Row, read_rows
from rto_megatron.errors import UserError
from rto_megatron.types import EndOfSequence

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
    truncated_answers_closed: int  # of these, those whose last kept token became end-of-sequence
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


@dataclass(frozen=True)
class Encoder:
    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    eos: EndOfSequence | None = None  # what ends an answer; None: the tokenizer's alone
    closes_cut_answers: bool = True  # else nothing says that a cut answer is over
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
        exchange = encode_exchange(self.tokenizer, messages[:-1], messages[-1].content, row.where, self.eos)
        limit = min(self.limits.max_prompt_tokens, self.limits.max_length - MIN_ANSWER_TOKENS)
        prompt_ids = self.limited_prompt(row, exchange.prompt_ids, limit)
        if prompt_ids is None:
            return None
        self.counts["answers_cut_at_eos"] += exchange.num_cut_tokens > 0
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
        truncated_answers_closed=counts["truncated_answers_closed"],
        answers_cut_at_eos=counts["answers_cut_at_eos"],
        identical_pairs=counts["identical_pairs"],
    )
    if not items:
        limit = encoder.limits.max_prompt_tokens
        reason = dropped_as or f"with a prompt over its limit; check data.max_prompt_tokens ({limit})"
        raise UserError(f"{source}: no rows to use; {num_rows} read, {report.dropped} dropped {reason}")
    return Loaded(tuple(items), report)
