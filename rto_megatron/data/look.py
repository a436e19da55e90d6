"""The first rows of a stage's local data, judged as the stage will judge them."""

from collections import Counter
from dataclasses import dataclass
from glob import glob
from itertools import chain, islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rto_megatron.config import schema
from rto_megatron.config.facts import facts_of
from rto_megatron.config.inputs import EvaluateDataConfig, ExampleDataConfig, PromptDataConfig
from rto_megatron.config.source_names import SUFFIXES, Sources, hub_set, is_pattern, parts_of
from rto_megatron.config.training import FP8_MULTIPLE
from rto_megatron.data.bad_rows import BadRows
from rto_megatron.data.budget import over_budget
from rto_megatron.data.cut import Layout
from rto_megatron.data.layouts import READERS
from rto_megatron.data.limits import Limits, limits_of, wanted_examples
from rto_megatron.data.load_report import Loaded, PartReport
from rto_megatron.data.loader import (
    load_demonstrations,
    load_judged_rows,
    load_pairs,
    load_prompts,
    load_texts,
)
from rto_megatron.data.loading import refuse_rows
from rto_megatron.data.reading import Examples
from rto_megatron.data.row import BadRow
from rto_megatron.data.sources import scan_rows
from rto_megatron.errors import UserError
from rto_megatron.types import EndOfSequence, Example

NUM_ROWS = 1000  # of each file


@dataclass(frozen=True)
class DataSource:
    """What a key of the configuration names, and the examples that the stage expects there.

    Example:
        DataSource(key="data.train", source="pairs.jsonl", wanted="pairs").absence
    """

    key: str
    source: str
    wanted: Examples

    @property
    def absence(self) -> str | None:
        """Why it cannot be looked at; None where it can, or where its name is wrong anywhere."""
        if Path(self.source).exists():
            return None
        if hub_set(self.source) is not None:
            return "on the hub"
        if is_pattern(self.source):
            matches = glob(self.source, recursive=True)
            return None if matches else "a pattern that no file on this machine matches"
        return "not on this machine" if self.source.endswith(SUFFIXES) else None


def data_sources(config: schema.Stage) -> list[DataSource]:
    """Every source of rows that a stage reads."""
    data, wanted = config.data, wanted_examples(config)
    named: list[tuple[str, Sources | None, Examples]] = []
    if isinstance(data, ExampleDataConfig | PromptDataConfig):
        named.append(("data.train", data.train, wanted))
    if isinstance(data, ExampleDataConfig | PromptDataConfig | EvaluateDataConfig):
        named.append(("data.eval", data.eval, wanted))
    if isinstance(data, PromptDataConfig):
        named.append(("data.pretrain", data.pretrain, "texts"))
    return [
        DataSource(key, part.source, examples)
        for key, sources, examples in named
        if sources is not None
        for part in parts_of(sources)
    ]


def look(
    config: schema.Stage,
    data: DataSource,
    tokenizer: PreTrainedTokenizerBase | None,
    eos: EndOfSequence | None,
) -> str:
    """What becomes of the first rows of a source.

    Args:
        tokenizer: the policy's; None: the layout alone is judged.
        eos: what ends an answer of the policy.

    Raises:
        UserError: the stage would end with this message, or with one that names more rows.
    """
    limits = limits_of(config)
    if tokenizer is None:
        return _layout_alone(data, limits)
    loaded = first_examples(config, data, tokenizer, eos, NUM_ROWS)
    warning = over_budget(loaded.items, data.source, _layout(config))
    return "\n  ".join([loaded.report.summary(), *([] if warning is None else [warning])])


def first_examples(
    config: schema.Stage,
    data: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    eos: EndOfSequence | None,
    num_rows: int,
) -> Loaded[Example]:
    """The first rows of a source as the stage reads them; arguments and errors as `look`."""
    limits, source = limits_of(config), data.source
    match data.wanted:
        case "prompts":
            return load_prompts(source, tokenizer, limits, num_rows)
        case "pairs":
            has_margins = facts_of(config).reads_margins
            return load_pairs(source, tokenizer, limits, num_rows, eos, has_margins)
        case "demonstrations":
            return load_demonstrations(source, tokenizer, limits, num_rows, eos)
        case "judgements":  # the rows that follow may answer other prompts
            rows = load_judged_rows(source, tokenizer, limits, num_rows, eos)
            return Loaded(tuple(chain.from_iterable(rows.items)), rows.report, ())
        case "texts":
            return load_texts(source, tokenizer, limits, num_rows)


def _layout(config: schema.Stage) -> Layout:
    batch, rows = config.batch, FP8_MULTIPLE if config.precision.fp8 else 1
    multiple = rows * config.parallel.row_multiple
    return Layout(batch.micro, batch.packed, multiple, torch.device("cpu"), batch.tokens)


def _layout_alone(data: DataSource, limits: Limits) -> str:
    bad, num_rows, layouts = BadRows(), 0, Counter[str]()
    for row in islice(scan_rows(data.source), NUM_ROWS):
        num_rows += 1
        if isinstance(row, BadRow):
            bad.add(row.where, row.problem)
            continue
        try:
            layouts[READERS[data.wanted].read(row, limits.layout).layout] += 1
        except UserError as error:
            bad.add(row.where, str(error))
    if limits.bad_rows == "error" or bad.number == num_rows:
        refuse_rows(data.source, num_rows, bad)
    part = PartReport(data.source, 1.0, num_rows, num_rows - bad.number, layouts)
    heading = f"{data.source}: {num_rows} rows read, {bad.number} bad rows"
    return "\n  ".join([heading, part.layout_line(), *bad.told(limit=3)])
