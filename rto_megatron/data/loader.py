"""Reads prompts, preference pairs, demonstrations, verdicts and texts in the layouts of `layouts` and tokenizes them.

An answer that does not fit in `max_length` is cut. In pairs and verdicts the last token that is kept becomes the
end-of-sequence token, as in the released code: the reward model reads its score there. Demonstrations and texts, on
whose every token a model is trained to continue like them, get none: it would learn to stop in mid-sentence. Whatever
was dropped or cut is counted in the `LoadReport`.
"""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rto_megatron.config.source_names import Sources
from rto_megatron.data.encoder import Encoder
from rto_megatron.data.layouts import DEMONSTRATIONS, JUDGEMENTS, PAIRS, PROMPTS, TEXTS
from rto_megatron.data.limits import Limits
from rto_megatron.data.load_report import Loaded
from rto_megatron.data.loading import load_examples, load_rows
from rto_megatron.data.mixture import Portion
from rto_megatron.data.row import Row
from rto_megatron.data.rows import json_columns, margin, row_id
from rto_megatron.errors import DataError
from rto_megatron.types import Demonstration, EndOfSequence, JudgedResponse, PreferencePair, Prompt


def load_prompts(
    source: Sources,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    max_rows: int | None = None,
    keeps_columns: bool = False,
    shards: Path | None = None,
) -> Loaded[Prompt]:
    """Load prompts for rollouts.

    Args:
        source: see `sources.scan_rows`; or the parts of a mixture.
        tokenizer: the policy's, with a chat template.
        limits: only `max_prompt_tokens` and `overlong` matter here.
        max_rows: rows to read; None for all.
        keeps_columns: each prompt carries the columns of its row that JSON can hold.
        shards: see `loading.load_examples`.

    Raises:
        UserError: a row is not in a known layout, a prompt is too long under "error", or no row is left.
    """
    encoder = Encoder(tokenizer, limits)

    def convert(row: Row) -> Prompt | None:
        ids = encoder.prompt(row, encoder.read(PROMPTS, row))
        kept = encoder.limited_prompt(row, ids, limits.max_prompt_tokens)
        return None if kept is None else Prompt(row_id(row), kept, json_columns(row) if keeps_columns else {})

    return load_examples(source, convert, encoder, max_rows, shards)


def load_pairs(
    source: Sources,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    max_rows: int | None = None,
    eos: EndOfSequence | None = None,
    has_margins: bool = False,
    shards: Path | None = None,
) -> Loaded[PreferencePair]:
    """Load preference pairs; arguments and errors as `load_prompts`.

    Args:
        eos: what ends an answer; None: the tokenizer's token alone.
        has_margins: read by how much the chosen answer is better, 0 where a row does not say; False: all are 0, and
            the columns are not looked at.
    """
    encoder = Encoder(tokenizer, limits, eos)

    def convert(row: Row) -> PreferencePair | None:
        conversations = encoder.read(PAIRS, row)
        by = margin(row) if has_margins else 0.0
        answers = encoder.answers(row, conversations)
        if answers is None:
            return None
        chosen, rejected = answers
        encoder.counts["pairs_without_margin"] += by is None
        encoder.counts["identical_pairs"] += chosen.answer_ids == rejected.answer_ids
        return PreferencePair(
            id=row_id(row),
            prompt_ids=chosen.prompt_ids,
            chosen_ids=chosen.answer_ids,
            rejected_ids=rejected.answer_ids,
            margin=by or 0.0,
        )

    return load_examples(source, convert, encoder, max_rows, shards)


def load_demonstrations(
    source: Sources,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    max_rows: int | None = None,
    eos: EndOfSequence | None = None,
    shards: Path | None = None,
) -> Loaded[Demonstration]:
    """Load supervised examples; arguments and errors as `load_pairs`."""
    encoder = Encoder(tokenizer, limits, eos, closes_cut_answers=False)

    def convert(row: Row) -> Demonstration | None:
        messages = encoder.read(DEMONSTRATIONS, row)
        if limits.loss_on == "all":
            return encoder.turns(row, messages)
        exchange = encoder.example(row, messages)
        if exchange is None:
            return None
        return Demonstration(row_id(row), exchange.prompt_ids, exchange.answer_ids)

    return load_examples(source, convert, encoder, max_rows, shards)


def load_judged(
    source: Sources,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    max_rows: int | None = None,
    eos: EndOfSequence | None = None,
) -> Loaded[JudgedResponse]:
    """Load answers with verdicts: rows of prompt, completion and label, or preference pairs, two answers each.

    The unrelated answer of each is the first one of the nearest row before it that has another prompt.
    Arguments and errors as `load_pairs`; rows that all answer one prompt are refused too.
    """
    loaded = load_judged_rows(source, tokenizer, limits, max_rows, eos)
    encoder, rows = Encoder(tokenizer, limits, eos), loaded.items
    answers = []
    for index, row in enumerate(rows):
        others = (rows[index - back][0] for back in range(1, len(rows)))
        other = next((one for one in others if one.prompt_ids != row[0].prompt_ids), None)
        if other is None:
            raise DataError(
                f"{loaded.report.source}: all rows answer one prompt; the KL baseline of KTO needs another one"
            )
        for answer in row:
            room = limits.max_length - len(answer.prompt_ids)
            answers.append(replace(answer, unrelated_ids=encoder.fitted(other.response_ids, room)))
    return Loaded(tuple(answers), loaded.report, _of_answers(loaded))


def _of_answers(loaded: Loaded[tuple[JudgedResponse, ...]]) -> tuple[Portion, ...]:
    """What a pass takes of each part, in answers."""
    portions, first = [], 0
    for portion in loaded.portions:
        rows = loaded.items[first : first + portion.num_items]
        portions.append(Portion(sum(map(len, rows)), portion.weight))
        first += portion.num_items
    return tuple(portions)


def load_judged_rows(
    source: Sources,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    max_rows: int | None = None,
    eos: EndOfSequence | None = None,
) -> Loaded[tuple[JudgedResponse, ...]]:
    """The answers of each row, without unrelated ones; arguments and errors as `load_pairs`."""
    encoder = Encoder(tokenizer, limits, eos)

    def convert(row: Row) -> tuple[JudgedResponse, ...] | None:
        judged = encoder.read(JUDGEMENTS, row)
        answers = encoder.answers(row, [messages for messages, _ in judged])
        if answers is None:
            return None
        return tuple(
            JudgedResponse(row_id(row), answer.prompt_ids, answer.answer_ids, is_desirable, ())
            for answer, (_, is_desirable) in zip(answers, judged, strict=True)
        )

    return load_rows(source, convert, encoder, max_rows)


def load_texts(
    source: Sources,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    max_rows: int | None = None,
    shards: Path | None = None,
) -> Loaded[Demonstration]:
    """Load texts of column `text` for a language-model loss on every token but the first.

    Longer texts than `max_length` are cut; rows of fewer than two tokens are dropped.

    Raises:
        UserError: a row has no text, or no row is left.
    """
    encoder = Encoder(tokenizer, limits)

    def convert(row: Row) -> Demonstration | None:
        ids = encoder.text(row, encoder.read(TEXTS, row))
        if len(ids) > limits.max_length:
            encoder.counts["truncated_answers"] += 1
            ids = ids[: limits.max_length]
        return None if len(ids) < 2 else Demonstration(row_id(row), ids[:1], ids[1:])

    return load_examples(source, convert, encoder, max_rows, shards, "of fewer than two tokens")
