"""Token ids of prompts and answers under a tokenizer's chat template.

The answer's ids are what follows the prompt's ids in the whole conversation. Where the two texts merge at their border
into other ids, prompt and answer are tokenized apart. Prompts carry the tokenizer's beginning-of-sequence token exactly
once, and an answer ends at the first token that would end a sampled response; where the template writes none, the
tokenizer's end-of-sequence token is appended. What the template leaves out is refused, but for reasoning of earlier
turns, which is counted.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from rto_megatron.data.eos import own_eos
from rto_megatron.data.left_out import Part, left_out, refuse
from rto_megatron.data.messages import Conversation
from rto_megatron.data.template import ChatTemplate
from rto_megatron.data.thoughts import Answer, answer_after, leading_empty_thought
from rto_megatron.errors import DataError
from rto_megatron.types import EndOfSequence


@dataclass(frozen=True)
class EncodedPrompt:
    """A conversation that waits for the assistant's turn.

    Example:
        EncodedPrompt(ids=(1, 7, 9), num_thoughts_left_out=0)
    """

    ids: tuple[int, ...]
    num_thoughts_left_out: int  # reasoning of earlier turns that the template does not render


@dataclass(frozen=True)
class Exchange:
    """A prompt and one answer to it; the answer holds no end-of-sequence token but its last one, which is one unless a
    length limit cut the answer.

    Example:
        Exchange(prompt_ids=(1, 7), answer_ids=(9, 2), num_cut_tokens=0)
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    num_cut_tokens: int  # tokens that stood after an end-of-sequence token inside the answer's text
    num_thoughts_left_out: int = 0  # reasoning of earlier turns that the template does not render
    is_apart: bool = False  # the rendered prompt is not how the rendered conversation begins
    is_open: bool = False  # the answer does not close the thought that the prompt opens


def encode_prompt(template: ChatTemplate, conversation: Conversation, where: str) -> EncodedPrompt:
    """Ids of a conversation that waits for the assistant's turn, generation header included.

    Raises:
        UserError: the template refuses the conversation or leaves something out.
    """
    text = template.text(conversation, True, where)
    thoughts, others = sorted_parts(left_out(template, conversation, text, True, where), ())
    refuse(template, conversation, others, where)
    return EncodedPrompt(encode_text(template.tokenizer, text), len(thoughts))


def encode_exchange(
    template: ChatTemplate,
    conversation: Conversation,
    where: str,
    eos: EndOfSequence | None = None,
    skips_empty_thoughts: bool = False,
) -> Exchange:
    """Ids of a prompt and of the assistant's answer to it, which is the conversation's last turn.

    Args:
        eos: what ends an answer; None: the tokenizer's alone.
        skips_empty_thoughts: a thought without a word at the answer's beginning belongs to the prompt.

    Raises:
        UserError: the template refuses the conversation, leaves something out, or renders the prompt otherwise than
            the beginning of the conversation; or the answer does not close the thought that the prompt opens.
    """
    encode = partial(encode_text, template.tokenizer)
    prompt_text, prompt_ids = template.prompt(conversation.prompt, encode, where)
    whole_text = template.text(conversation, False, where)
    answer = answer_after(prompt_text, whole_text, conversation.messages[-1].content)
    last = len(conversation.messages) - 1
    lost = left_out(template, conversation, whole_text, False, where, (last,))
    if answer.has_thought_back:
        lost = [part for part in lost if (part.turn, part.piece) != (last, "thought")]
    thoughts, others = sorted_parts(lost, (last,))
    refuse(template, conversation, others, where)
    _require_agreed(template, conversation, answer, where)
    if answer.is_apart:
        in_prompt = left_out(template, conversation.prompt, prompt_text, True, where)
        thoughts, others = sorted_parts(in_prompt, ())
        refuse(template, conversation.prompt, others, where)
    if skips_empty_thoughts and (empty := leading_empty_thought(prompt_text, answer.text)):
        prompt_text, answer = prompt_text + empty, replace(answer, text=answer.text.removeprefix(empty))
        prompt_ids = encode(prompt_text)
    whole_ids = () if answer.is_apart else encode(prompt_text + answer.text)
    if whole_ids[: len(prompt_ids)] == prompt_ids and len(whole_ids) > len(prompt_ids):
        answer_ids = whole_ids[len(prompt_ids) :]
    else:
        answer_ids = tuple(template.tokenizer.encode(answer.text, add_special_tokens=False))
    return replace(
        _ended(template.tokenizer, eos or own_eos(template.tokenizer), prompt_ids, answer_ids),
        num_thoughts_left_out=len(thoughts),
        is_apart=answer.is_apart,
        is_open=answer.is_open,
    )


def sorted_parts(lost: list[Part], trained: Collection[int]) -> tuple[list[Part], list[Part]]:
    """Reasoning of turns that are not trained, and all else."""
    thoughts = [part for part in lost if part.is_reasoning and part.turn not in trained]
    return thoughts, [part for part in lost if part not in thoughts]


def _require_agreed(template: ChatTemplate, conversation: Conversation, answer: Answer, where: str) -> None:
    """Refuses what only a setting of the run allows."""
    if answer.is_apart and not template.options.allow_non_prefix:
        raise DataError(
            f"{where}: the chat template renders the prompt, with its generation header, otherwise than the beginning "
            "of the conversation, so that the answer would be trained after another text than it is sampled after; "
            "take a template that does not, or set data.allow_non_prefix=true to join the rendered prompt and the "
            "bare answer"
        )
    fields = sorted(conversation.messages[-1].fields)
    if answer.is_apart and fields:
        raise DataError(
            f"{where}: the answer has {', '.join(fields)}, and the chat template does not render it behind its prompt "
            "(data.allow_non_prefix joins the content alone); remove these fields, or take another template"
        )
    if answer.is_open:
        require_open_thoughts(template, where)


def require_open_thoughts(template: ChatTemplate, where: str) -> None:
    """Refuses an answer that does not close the thought which its prompt opens, unless the run keeps such answers."""
    if template.options.open_thought == "error":
        raise DataError(
            f"{where}: the generation prompt opens a thought that the answer does not close, so that the model would "
            "learn to answer inside its thoughts; write the reasoning and its closing tag before the answer, or set "
            "data.open_thought=keep to train it as it is"
        )


def _ended(
    tokenizer: PreTrainedTokenizerBase,
    eos: EndOfSequence,
    prompt_ids: tuple[int, ...],
    answer_ids: tuple[int, ...],
) -> Exchange:
    end = next((place for place, token in enumerate(answer_ids) if token in eos.ids), None)
    if end is None:
        return Exchange(prompt_ids, (*answer_ids, eos.written), 0)
    # Some templates write a line break after the end-of-sequence token: that is no part of the answer.
    rest = str(tokenizer.decode(list(answer_ids[end:]), skip_special_tokens=True)).strip()
    return Exchange(prompt_ids, answer_ids[: end + 1], len(answer_ids) - end - 1 if rest else 0)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of a text or a rendered template, with one beginning-of-sequence token if the tokenizer uses it.

    That token may come from the template, the tokenizer or both.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    return normal_start(tokenizer, ids, [False] * len(ids))[0]


def normal_start(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], marks: Sequence[bool]
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The ids with one beginning-of-sequence token if the tokenizer uses it, and the marks of each; that token's is
    False."""
    bos = tokenizer.bos_token_id
    first = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    if bos is None or not (first > 0 or tokenizer.encode("")[:1] == [bos]):
        return tuple(ids), tuple(marks)
    return (bos, *ids[first:]), (False, *marks[first:])
