"""Token sequences that calibrate a quantisation, and others, held out, that measure it."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from rto_megatron.data.chat import encode_prompt, encode_text
from rto_megatron.data.row import Row
from rto_megatron.data.soundness import TokenizerJudge, require_characters
from rto_megatron.data.sources import read_rows
from rto_megatron.data.template import ChatTemplate, TemplateOptions
from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.data.turns import conversation_of, turns, with_system
from rto_megatron.data.vocabulary import Embedding, require_rows
from rto_megatron.errors import DataError

NUM_HELD_OUT = 8
_COLUMNS = ("prompt", "context_messages", "messages", "chosen", "text", "response", "completion")


@dataclass(frozen=True)
class Prompts:
    """Ids [1, tokens] of each sequence, and where they came from.

    Example:
        Prompts(origin="prompts.jsonl", calibration=calibration, held_out=held_out, template_date=None).sha256()
    """

    origin: str
    calibration: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    template_date: str | None  # that the chat template prints; None: it prints none

    def sha256(self) -> str:
        """The hash of all ids and of the lengths, calibration first."""
        digest = hashlib.sha256()
        for ids in (*self.calibration, *self.held_out):
            digest.update(ids.shape[1].to_bytes(8, "little") + ids.numpy().tobytes())
        return digest.hexdigest()


def random_prompts(vocab_size: int, num_prompts: int, max_length: int, seed: int) -> Prompts:
    """Uniform random tokens: they need no tokenizer, and say little about the activations of real text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (num_prompts + NUM_HELD_OUT, 1, max_length), generator=generator)
    origin = f"uniform random tokens of seed {seed}: input scales fit noise, not text; give --prompts for a real model"
    return _split(origin, tuple(ids), num_prompts, None)


def read_prompts(
    source: str, tokenizer_folder: Path, vocab_size: int, num_prompts: int, max_length: int
) -> Prompts:
    """The first `num_prompts` rows calibrate, the next NUM_HELD_OUT measure; each is cut to `max_length` tokens.

    Raises:
        DataError: the source cannot be read, has no column of text, holds too few rows, the tokenizer makes nothing of
            a text, or there is a token that the model has no row for.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    moment = datetime.now()  # one for all rows, so that midnight does not part them
    template = ChatTemplate(tokenizer, TemplateOptions(moment=moment))
    judge = TokenizerJudge(tokenizer)
    wanted = num_prompts + NUM_HELD_OUT
    embedding = Embedding("the model", vocab_size)

    def encoded() -> Iterator[Tensor]:
        for row in read_rows(source):
            column = _column(row)
            content = row.columns[column]
            if isinstance(content, str):
                text = require_characters(content, row.where)
                ids = encode_text(tokenizer, text)
            else:
                asked = conversation_of(row, with_system(row, turns(row, column)))
                text = asked.text
                ids = encode_prompt(template, asked, row.where).ids
            judge.judge(text, ids, row.where)
            kept = ids[:max_length]
            require_rows(source, [(row.where, kept)], tokenizer, embedding)
            yield torch.tensor([kept])

    found = tuple(islice(encoded(), wanted))
    if len(found) < wanted:
        raise DataError(
            f"{source} has {len(found)} rows; expected {wanted}: {num_prompts} for calibration and {NUM_HELD_OUT} held "
            "out; lower --num-prompts or give more rows"
        )
    date = f"{moment:%Y-%m-%d}" if template.prints_date else None
    return _split(source, found, num_prompts, date)


def _split(origin: str, found: tuple[Tensor, ...], num_prompts: int, date: str | None) -> Prompts:
    return Prompts(origin, found[:num_prompts], found[num_prompts:], date)


def _column(row: Row) -> str:
    """The first column that holds text or a conversation."""
    for column in _COLUMNS:
        value = row.columns.get(column)
        if isinstance(value, str) and value:
            return column
        if isinstance(value, list) and value and all(isinstance(t, dict) and "content" in t for t in value):
            return column
    raise DataError(
        f"{row.where}: found the columns {sorted(row.columns)}, expected text or messages in one of {list(_COLUMNS)}"
    )
