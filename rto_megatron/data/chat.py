"""Token ids of prompts and answers under a tokenizer's chat template.

The answer's ids are what follows the prompt's ids in the whole conversation. A template for which the
prompt (with its generation header) is no prefix of the conversation, as text or as ids, gets prompt and
answer tokenized apart and joined. Prompts carry the tokenizer's beginning-of-sequence token exactly once,
and an answer ends at the first token that would end a sampled response; where the template writes none, the tokenizer's
end-of-sequence token is appended.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from rto_megatron.data.eos import own_eos
from rto_megatron.data.soundness import require_characters
from rto_megatron.errors import UserError
from rto_megatron.types import EndOfSequence


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Exchange:
    """A prompt and one answer to it; the answer holds no end-of-sequence token but its last one, which is one unless a
    length limit cut the answer."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    num_cut_tokens: int  # tokens that stood after an end-of-sequence token inside the answer's text


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str
) -> tuple[int, ...]:
    """Ids of a conversation that waits for the assistant's turn, generation header included.

    Raises:
        UserError: the template refuses the messages.
    """
    return encode_text(tokenizer, _render(tokenizer, messages, True, where))


def encode_exchange(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    answer: str,
    where: str,
    eos: EndOfSequence | None = None,
) -> Exchange:
    """Ids of a prompt and of the assistant's answer to it.

    Args:
        eos: what ends an answer; None: the tokenizer's alone.

    Raises:
        UserError: the template refuses the messages.
    """
    prompt_text = _render(tokenizer, messages, True, where)
    whole_text = _render(tokenizer, [*messages, Message("assistant", answer)], False, where)
    prompt_ids = encode_text(tokenizer, prompt_text)
    whole_ids = encode_text(tokenizer, whole_text)
    if whole_ids[: len(prompt_ids)] == prompt_ids and len(whole_ids) > len(prompt_ids):
        answer_ids = whole_ids[len(prompt_ids) :]
    else:
        is_prefix = whole_text.startswith(prompt_text)
        answer_text = whole_text[len(prompt_text) :] if is_prefix else answer
        answer_ids = tuple(tokenizer.encode(answer_text, add_special_tokens=False))
    return _ended(tokenizer, eos or own_eos(tokenizer), prompt_ids, answer_ids)


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


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], with_header: bool, where: str
) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=with_header)
    except jinja2.TemplateError as error:
        raise UserError(
            f"{where}: the tokenizer's chat template refuses the roles "
            f"{[message.role for message in messages]} ({error}); change the data or the template"
        ) from error
    return require_characters(str(text), where)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of a text or a rendered template, with one beginning-of-sequence token if the tokenizer uses it.

    That token may come from the template, the tokenizer or both.
    """
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    first = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    has_bos = first > 0 or tokenizer.encode("")[:1] == [bos]
    return (bos, *ids[first:]) if has_bos else ids
