"""Token ids of a whole conversation, of which every turn of the assistant is learnt.

Where the chat template marks what the assistant writes (`{% generation %}`), the learnt tokens are those of
transformers' `return_assistant_tokens_mask`. Elsewhere a turn is what follows its rendered prompt, up to its first
end-of-sequence token: what the model would have sampled there. A template that renders a turn otherwise once others
follow it has no such place, and is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from rto_megatron.data.chat import normal_start, require_open_thoughts, sorted_parts
from rto_megatron.data.left_out import left_out, refuse
from rto_megatron.data.messages import Conversation
from rto_megatron.data.template import ChatTemplate
from rto_megatron.data.thoughts import empty_thoughts, leaves_thought_open
from rto_megatron.errors import DataError
from rto_megatron.types import EndOfSequence

type _Span = tuple[int, int]  # characters: first, and behind the last


@dataclass(frozen=True)
class LearntTurns:
    """A conversation up to its last learnt token.

    Example:
        LearntTurns(ids=(1, 7, 9, 2), is_learnt=(False, False, True, True), num_thoughts_left_out=0, num_endless=0)
    """

    ids: tuple[int, ...]
    is_learnt: tuple[bool, ...]  # one of each id; the last is True
    num_thoughts_left_out: int  # reasoning of turns that are not learnt, which the template does not render
    num_endless: int  # learnt turns without an end-of-sequence token
    num_open: int = 0  # learnt turns that do not close the thought that their prompt opens

    @property
    def first(self) -> int:
        """The place of the first learnt id."""
        return self.is_learnt.index(True)

    def skipped(self, first: int, end: int) -> tuple[tuple[int, int], ...]:
        """Stretches of `ids[first:end]` that are not learnt: (first, behind the last) of it."""
        edges = [first, *(place for place in range(first + 1, end) if self._turns_at(place)), end]
        return tuple((a - first, b - first) for a, b in pairwise(edges) if not self.is_learnt[a])

    def _turns_at(self, place: int) -> bool:
        return self.is_learnt[place] != self.is_learnt[place - 1]


@dataclass(frozen=True)
class _Tokens:
    """Ids of a text, and where each stands in it."""

    ids: list[int]
    offsets: list[_Span]


def encode_turns(
    template: ChatTemplate,
    conversation: Conversation,
    where: str,
    eos: EndOfSequence,
    skips_empty_thoughts: bool = False,
) -> LearntTurns:
    """Ids of the conversation, with what is learnt of them.

    Args:
        eos: what ends a turn.
        skips_empty_thoughts: thoughts without a word are not learnt.

    Raises:
        UserError: the template refuses the conversation, leaves something of it out, or renders a turn otherwise once
            others follow; a turn spells an end-of-sequence token or leaves a thought open; or nothing is learnt.
    """
    text = template.text(conversation, False, where)
    learnt = [n for n, m in enumerate(conversation.messages) if m.role == "assistant" and m.is_learnt]
    lost = left_out(template, conversation, text, False, where, learnt)
    thoughts, others = sorted_parts(lost, learnt)
    refuse(template, conversation, others, where)
    num_open = 0
    if template.marks_turns:
        tokens, marks, ends = _marked(template, conversation, text, where, eos)
    else:
        spans = _spans(template, conversation, text, where)
        num_open = sum(leaves_thought_open(text[: spans[n][0]], text[slice(*spans[n])]) for n in learnt)
        if num_open:
            require_open_thoughts(template, where)
        tokens, marks, ends = _found(template, conversation, text, where, eos, spans)
    if skips_empty_thoughts:
        empty = empty_thoughts(text)
        marks = [mark and not _inside(at, empty) for mark, at in zip(marks, tokens.offsets, strict=True)]
    if not any(marks):
        raise DataError(f"{where}: no token of the assistant's turns is learnt; remove the row")
    behind = len(marks) - marks[::-1].index(True)
    ids, kept = normal_start(template.tokenizer, tokens.ids[:behind], marks[:behind])
    return LearntTurns(ids, kept, len(thoughts), ends, num_open)


def _marked(
    template: ChatTemplate, conversation: Conversation, text: str, where: str, eos: EndOfSequence
) -> tuple[_Tokens, list[bool], int]:
    """As transformers says what the assistant writes."""
    ids, mask = template.assistant_mask(conversation, where)
    tokens = _tokens(template.tokenizer, text, where)
    assert tokens.ids == ids, "transformers tokenizes the text that it renders"
    marks = [bool(mark) for mark in mask]
    stretches = [list(s) for s in _stretches(marks)]
    turns = [message for message in conversation.messages if message.role == "assistant"]
    if not all(message.is_learnt for message in turns):
        if len(stretches) != len(turns):
            raise DataError(
                f"{where}: the chat template marks {len(stretches)} stretches of {len(turns)} turns of the assistant, "
                "so that it cannot be told which of them have the weight 0; remove the weights"
            )
        for message, (first, end) in zip(turns, stretches, strict=True):
            if not message.is_learnt:
                marks[first:end] = [False] * (end - first)
    endless = sum(not set(ids[first:end]) & set(eos.ids) for first, end in _stretches(marks))
    return tokens, marks, endless


def _found(
    template: ChatTemplate,
    conversation: Conversation,
    text: str,
    where: str,
    eos: EndOfSequence,
    spans: Mapping[int, _Span],
) -> tuple[_Tokens, list[bool], int]:
    """As the prompts say after which the assistant writes: where each of its turns stands in the text."""
    tokens = _cut_at(template.tokenizer, text, [first for first, _ in spans.values()], where)
    marks, endless, is_last_open = [False] * len(tokens.ids), 0, False
    for number, (first, end) in spans.items():
        if not conversation.messages[number].is_learnt:
            continue
        places = [n for n, (a, b) in enumerate(tokens.offsets) if a < end and b > first]
        stop = next((n for n in places if tokens.ids[n] in eos.ids), None)
        if stop is not None and text[tokens.offsets[stop][1] : end].strip():
            raise DataError(
                f"{where}: message {number} spells the end-of-sequence token before its end; remove it there"
            )
        endless += stop is None
        for place in places if stop is None else range(places[0], stop + 1):
            marks[place] = True
        is_last_open = stop is None
    if conversation.messages[-1].is_learnt and is_last_open:
        at = (len(text), len(text))
        tokens = _Tokens([*tokens.ids, eos.written], [*tokens.offsets, at])
        return tokens, [*marks, True], endless - 1
    return tokens, marks, endless


def _spans(template: ChatTemplate, conversation: Conversation, text: str, where: str) -> dict[int, _Span]:
    """Number of each turn of the assistant -> where it stands in the text."""
    spans = {}
    last = len(conversation.messages) - 1
    for number, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        before = template.text(replace(conversation, messages=conversation.messages[:number]), True, where)
        up_to = replace(conversation, messages=conversation.messages[: number + 1])
        after = text if number == last else template.text(up_to, False, where)
        if not text.startswith(before) or not text.startswith(after):
            raise DataError(
                f"{where}: the chat template renders message {number} of the whole conversation otherwise than where "
                "it is sampled, so that its tokens cannot be learnt there; take data.loss_on=last, or a template that "
                "marks what is learnt with {% generation %}"
            )
        spans[number] = (len(before), len(after))
    return spans


def _cut_at(tokenizer: PreTrainedTokenizerBase, text: str, starts: list[int], where: str) -> _Tokens:
    """Tokens of a text of which none reaches over the start of a turn: a sampler begins a token there."""
    whole = _tokens(tokenizer, text, where)
    cuts = [start for start in starts if any(a < start < b for a, b in whole.offsets)]
    if not cuts:
        return whole
    pieces = [
        (first, _tokens(tokenizer, text[first:end], where)) for first, end in pairwise([0, *cuts, len(text)])
    ]
    return _Tokens(
        [id_ for _, piece in pieces for id_ in piece.ids],
        [(first + a, first + b) for first, piece in pieces for a, b in piece.offsets],
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> _Tokens:
    if not tokenizer.is_fast:
        raise DataError(
            f"{where}: data.loss_on=all needs to know where tokens stand in the text, which this tokenizer cannot say; "
            "put the tokenizer.json of the model into its folder"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return _Tokens([*encoded["input_ids"]], [(a, b) for a, b in encoded["offset_mapping"]])


def _stretches(marks: list[bool]) -> list[tuple[int, int]]:
    edges = [n for n in range(1, len(marks)) if marks[n] != marks[n - 1]]
    return [(a, b) for a, b in pairwise([0, *edges, len(marks)]) if marks and marks[a]]


def _inside(at: _Span, spans: list[_Span]) -> bool:
    return any(first <= at[0] and at[1] <= end for first, end in spans)
