"""Rows of a source become token ids within length limits; what was cut is counted."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from rto_megatron.data.all_turns import encode_turns
from rto_megatron.data.chat import Exchange, encode_exchange, encode_prompt, encode_text
from rto_megatron.data.eos import own_eos
from rto_megatron.data.limits import MIN_ANSWER_TOKENS, Limits
from rto_megatron.data.messages import Message
from rto_megatron.data.reading import Reader
from rto_megatron.data.row import Row
from rto_megatron.data.rows import row_id
from rto_megatron.data.soundness import TokenizerJudge, require_characters
from rto_megatron.data.template import ChatTemplate
from rto_megatron.data.turns import conversation_of
from rto_megatron.errors import DataError
from rto_megatron.types import Demonstration, EndOfSequence


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
    layouts: Counter[str] = field(default_factory=Counter)  # rows by the layout that they were read in

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's."""
        return ChatTemplate(self.tokenizer, self.limits.template)

    @cached_property
    def _judge(self) -> TokenizerJudge:
        return TokenizerJudge(self.tokenizer)

    def read[T](self, reader: Reader[T], row: Row) -> T:
        """What the row says, in the layout that its columns have."""
        said = reader.read(row, self.limits.layout)
        self.layouts[said.layout] += 1
        return said.value

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
        """The prompt and the answer, which is the last turn, within the limits; None: the row is dropped.

        Raises:
            UserError: the row cannot be used.
        """
        found = self.answers(row, [messages])
        return None if found is None else found[0]

    def answers(self, row: Row, conversations: Sequence[Sequence[Message]]) -> list[Exchange] | None:
        """As `example`, of several answers to one prompt, which is counted once."""
        first = self._exchange(row, conversations[0])
        prompt_ids = self._counted_prompt(row, first.prompt_ids, first.num_thoughts_left_out)
        if prompt_ids is None:
            return None
        found = [self._within(prompt_ids, first)]
        for messages in conversations[1:]:
            found.append(self._within(prompt_ids, self._exchange(row, messages)))
        return found

    def _exchange(self, row: Row, messages: Sequence[Message]) -> Exchange:
        """Of any length."""
        if not messages[-1].is_learnt:
            raise DataError(
                f"{row.where}: the last turn has the weight 0, and nothing would be learnt; remove the row"
            )
        conversation = conversation_of(row, messages)
        skips = self.limits.empty_thoughts == "skip"
        exchange = encode_exchange(self.template, conversation, row.where, self.eos, skips)
        self._judge.judge(conversation.prompt.text, exchange.prompt_ids, row.where)
        if not exchange.num_cut_tokens:
            self._judge.judge_answer(messages[-1].content, exchange.answer_ids, row.where)
        return exchange

    def _counted_prompt(
        self, row: Row, ids: tuple[int, ...], num_thoughts_left_out: int
    ) -> tuple[int, ...] | None:
        """The prompt of an example, with room for an answer; None: the row is dropped."""
        limit = min(self.limits.max_prompt_tokens, self.limits.max_length - MIN_ANSWER_TOKENS)
        prompt_ids = self.limited_prompt(row, ids, limit)
        if prompt_ids is not None:
            self.counts["earlier_thoughts_left_out"] += num_thoughts_left_out
        return prompt_ids

    def _within(self, prompt_ids: tuple[int, ...], exchange: Exchange) -> Exchange:
        """The exchange with a prompt within its limit, behind which its answer has the rest of the room."""
        self.counts["answers_cut_at_eos"] += exchange.num_cut_tokens > 0
        self.counts["answers_joined_apart"] += exchange.is_apart
        self.counts["thoughts_left_open"] += exchange.is_open
        room = self.limits.max_length - len(prompt_ids)
        is_cut = len(exchange.answer_ids) > room
        self.counts["truncated_answers"] += is_cut
        self.counts["truncated_answers_closed"] += is_cut and self.closes_cut_answers
        return replace(exchange, prompt_ids=prompt_ids, answer_ids=self.fitted(exchange.answer_ids, room))

    def turns(self, row: Row, messages: Sequence[Message]) -> Demonstration | None:
        """A conversation of which all turns of the assistant are learnt, within the limits; None: the row is dropped.

        Raises:
            UserError: the row cannot be used.
        """
        conversation = conversation_of(row, messages)
        skips = self.limits.empty_thoughts == "skip"
        learnt = encode_turns(self.template, conversation, row.where, self._ends, skips)
        self._judge.judge(conversation.text, learnt.ids, row.where)
        first = learnt.first
        prompt_ids = self._counted_prompt(row, learnt.ids[:first], learnt.num_thoughts_left_out)
        if prompt_ids is None:
            return None
        end = min(len(learnt.ids), first + self.limits.max_length - len(prompt_ids))
        self.counts["truncated_answers"] += end < len(learnt.ids)
        while not learnt.is_learnt[end - 1]:
            end -= 1
        self.counts["turns_without_end"] += learnt.num_endless
        self.counts["thoughts_left_open"] += learnt.num_open
        return Demonstration(row_id(row), prompt_ids, learnt.ids[first:end], learnt.skipped(first, end))

    @property
    def _ends(self) -> EndOfSequence:
        return self.eos or own_eos(self.tokenizer)

    def fitted(self, answer_ids: tuple[int, ...], room: int) -> tuple[int, ...]:
        """The answer, cut to `room` tokens where it is longer; then the last one is the tokenizer's end-of-sequence,
        or whatever stood there."""
        if len(answer_ids) <= room:
            return answer_ids
        if not self.closes_cut_answers:
            return answer_ids[:room]
        return (*answer_ids[: room - 1], self.tokenizer.eos_token_id)
