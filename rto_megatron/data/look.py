"""The first rows of a stage's local data, judged as the stage will judge them."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.algorithms.reward_model import reads_margins
from rto_megatron.config import schema
from rto_megatron.data.bad_rows import BadRows
from rto_megatron.data.encoder import Encoder, Limits, limits_of, load_rows, refuse_rows
from rto_megatron.data.layouts import (
    READERS,
    read_demonstration,
    read_judgements,
    read_pair,
    read_prompt,
    read_text,
)
from rto_megatron.data.other_layouts import Examples
from rto_megatron.data.rows import margin
from rto_megatron.data.sources import HUB_NAME, BadRow, Row, is_file, scan_rows
from rto_megatron.errors import UserError

NUM_ROWS = 1000  # of each file


@dataclass(frozen=True)
class DataSource:
    """What a key of the configuration names, and the examples that the stage expects there."""

    key: str
    source: str
    wanted: Examples

    @property
    def absence(self) -> str | None:
        """Why it cannot be looked at; None where it can, or where its name is wrong anywhere."""
        if is_file(self.source):
            return None if Path(self.source).is_file() else "not on this machine"
        return "on the hub" if HUB_NAME.fullmatch(self.source) else None


def data_sources(config: schema.Stage) -> list[DataSource]:
    """Every source of rows that a stage reads."""
    data = config.data
    if isinstance(data, schema.EvaluateDataConfig):
        return [DataSource("data.eval", data.eval, "prompts")]
    if isinstance(data, schema.PromptDataConfig):
        texts = [] if data.pretrain is None else [DataSource("data.pretrain", data.pretrain, "texts")]
        return [DataSource("data.train", data.train, "prompts"), *texts]
    assert isinstance(data, schema.ExampleDataConfig)
    method = ALGORITHMS[config.stage]
    assert isinstance(method, OfflineMethod)
    named = {"data.train": data.train, "data.eval": data.eval}
    return [DataSource(key, source, method.examples) for key, source in named.items() if source is not None]


def look(config: schema.Stage, data: DataSource, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """What becomes of the first rows of a source.

    Args:
        tokenizer: the policy's; None: the layout alone is judged.

    Raises:
        UserError: the stage would end with this message, or with one that names more rows.
    """
    limits = limits_of(config)
    if tokenizer is None:
        return _layout_alone(data, limits)
    encoder = Encoder(tokenizer, limits)
    has_margins = isinstance(config, schema.OfflineStage) and reads_margins(config.algorithm)

    def convert(row: Row) -> bool | None:
        if has_margins:
            margin(row)
        return _fits(row, data.wanted, encoder) or None

    return load_rows(data.source, convert, encoder, NUM_ROWS).report.summary()


def _fits(row: Row, wanted: Examples, encoder: Encoder) -> bool:
    """Whether a row is kept."""
    match wanted:
        case "prompts":
            ids = encoder.prompt(row, read_prompt(row))
            return encoder.limited_prompt(row, ids, encoder.limits.max_prompt_tokens) is not None
        case "pairs":
            return all(encoder.example(row, messages) is not None for messages in read_pair(row))
        case "demonstrations":
            return encoder.example(row, read_demonstration(row)) is not None
        case "judgements":
            return all(encoder.example(row, messages) is not None for messages, _ in read_judgements(row))
        case "texts":
            return len(encoder.text(row, read_text(row))) > 1


def _layout_alone(data: DataSource, limits: Limits) -> str:
    bad, num_rows = BadRows(), 0
    for row in islice(scan_rows(data.source), NUM_ROWS):
        num_rows += 1
        if isinstance(row, BadRow):
            bad.add(row.where, row.problem)
            continue
        try:
            READERS[data.wanted](row)
        except UserError as error:
            bad.add(row.where, str(error))
    if limits.bad_rows == "error" or bad.number == num_rows:
        refuse_rows(data.source, num_rows, bad)
    return "\n  ".join([f"{data.source}: {num_rows} rows read, {bad.number} bad rows", *bad.told(limit=3)])
