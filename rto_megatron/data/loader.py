"""Reads prompts, preference pairs, demonstrations, verdicts and texts in the public layouts and tokenizes them.

Layouts, by column names:
    prompts         context_messages [{role, content}]; or prompt, a string or a list of messages
    pairs           chosen and rejected [{role, content}], as in ultrafeedback_binarized; optional prompt_id,
                    and margin, or score_chosen and score_rejected (their difference is the margin)
    demonstrations  messages [{role, content}]; or chosen, as above; or prompt and response strings. The
                    last message is the target, everything before it is the prompt
    verdicts        prompt, completion (strings or messages) and label (true or false); or pairs, as above
    texts           text, a string

An answer that does not fit in `max_length` is cut. In pairs and verdicts the last token that is kept becomes the
end-of-sequence token, as in the released code: the reward model reads its score there. Demonstrations and texts, on
whose every token a model is trained to continue like them, get none: it would learn to stop in mid-sentence. Whatever
was dropped or cut is counted in the `LoadReport`.
"""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from rto_megatron.data.chat import Message, encode_prompt, encode_text
from rto_megatron.data.encoder import Encoder, Limits, Loaded, load_rows
from rto_megatron.data.rows import (
    completed,
    conversation,
    first_column,
    label,
    margin,
    prompt_messages,
    row_id,
    text,
)
from rto_megatron.data.sources import Row
from rto_megatron.errors import UserError
from rto_megatron.types import Demonstration, EndOfSequence, JudgedResponse, PreferencePair, Prompt


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
    encoder = Encoder(tokenizer, limits)

    def convert(row: Row) -> Prompt | None:
        column = first_column(row, ("context_messages", "prompt"), "prompts")
        messages = prompt_messages(row, column)
        ids = encode_prompt(tokenizer, messages, row.where)
        kept = encoder.limited_prompt(row, ids, limits.max_prompt_tokens)
        return None if kept is None else Prompt(row_id(row), kept)

    return load_rows(source, convert, encoder, max_rows)


def load_pairs(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    max_rows: int | None = None,
    eos: EndOfSequence | None = None,
) -> Loaded[PreferencePair]:
    """Load preference pairs; arguments and errors as `load_prompts`.

    Args:
        eos: what ends an answer; None: the tokenizer's token alone.
    """
    encoder = Encoder(tokenizer, limits, eos)

    def convert(row: Row) -> PreferencePair | None:
        chosen = conversation(row, "chosen")
        rejected = conversation(row, "rejected")
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
            id=row_id(row),
            prompt_ids=chosen_exchange.prompt_ids,
            chosen_ids=chosen_exchange.answer_ids,
            rejected_ids=rejected_exchange.answer_ids,
            margin=margin(row),
        )

    return load_rows(source, convert, encoder, max_rows)


def load_demonstrations(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    max_rows: int | None = None,
    eos: EndOfSequence | None = None,
) -> Loaded[Demonstration]:
    """Load supervised examples; arguments and errors as `load_pairs`."""
    encoder = Encoder(tokenizer, limits, eos, closes_cut_answers=False)

    def convert(row: Row) -> Demonstration | None:
        column = first_column(row, ("messages", "chosen", "response"), "demonstrations")
        if column == "response":
            messages = [*prompt_messages(row, "prompt"), Message("assistant", text(row, "response"))]
        else:
            messages = conversation(row, column)
        exchange = encoder.example(row, messages)
        if exchange is None:
            return None
        return Demonstration(row_id(row), exchange.prompt_ids, exchange.answer_ids)

    return load_rows(source, convert, encoder, max_rows)


def load_judged(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    max_rows: int | None = None,
    eos: EndOfSequence | None = None,
) -> Loaded[JudgedResponse]:
    """Load answers with verdicts: rows of prompt, completion and label, or preference pairs, two answers each.

    The unrelated answer of each is the first one of the nearest row before it that has another prompt.
    Arguments and errors as `load_pairs`.
    """
    encoder = Encoder(tokenizer, limits, eos)

    def convert(row: Row) -> tuple[JudgedResponse, ...] | None:
        if "label" in row.columns:
            verdicts = [(completed(row), label(row))]
        else:
            first_column(row, ("chosen", "label"), "answers with verdicts")
            verdicts = [(conversation(row, "chosen"), True), (conversation(row, "rejected"), False)]
        answers = []
        for messages, is_desirable in verdicts:
            exchange = encoder.example(row, messages)
            if exchange is None:
                return None
            answers.append(
                JudgedResponse(row_id(row), exchange.prompt_ids, exchange.answer_ids, is_desirable, ())
            )
        return tuple(answers)

    loaded = load_rows(source, convert, encoder, max_rows)
    rows = loaded.items
    answers = []
    for index, row in enumerate(rows):
        others = (rows[index - back][0] for back in range(1, len(rows)))
        other = next((one for one in others if one.prompt_ids != row[0].prompt_ids), None)
        if other is None:
            raise UserError(f"{source}: all rows answer one prompt; the KL baseline of KTO needs another one")
        for answer in row:
            room = limits.max_length - len(answer.prompt_ids)
            answers.append(replace(answer, unrelated_ids=encoder.fitted(other.response_ids, room)))
    return Loaded(tuple(answers), loaded.report)


def load_texts(source: str, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Loaded[Demonstration]:
    """Load texts of column `text` for a language-model loss on every token but the first.

    Longer texts than `max_length` are cut; rows of fewer than two tokens are dropped.

    Raises:
        UserError: a row has no text, or no row is left.
    """
    encoder = Encoder(tokenizer, limits)

    def convert(row: Row) -> Demonstration | None:
        first_column(row, ("text",), "texts")
        ids = encode_text(tokenizer, text(row, "text"))
        if len(ids) > limits.max_length:
            encoder.counts["truncated_answers"] += 1
            ids = ids[: limits.max_length]
        return None if len(ids) < 2 else Demonstration(row_id(row), ids[:1], ids[1:])

    return load_rows(source, convert, encoder, None, "of fewer than two tokens")
