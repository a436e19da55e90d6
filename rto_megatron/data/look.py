"""The first rows of a stage's local data, judged as the stage will judge them."""

from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.config import schema
from rto_megatron.config.facts import facts_of
from rto_megatron.config.inputs import EvaluateDataConfig, ExampleDataConfig, PromptDataConfig
from rto_megatron.data.bad_rows import BadRows
from rto_megatron.data.budget import over_budget
from rto_megatron.data.cut import Layout
from rto_megatron.data.encoder import Limits, Loaded, limits_of, refuse_rows
from rto_megatron.data.layouts import READERS
from rto_megatron.data.loader import (
    load_demonstrations,
    load_judged_rows,
    load_pairs,
    load_prompts,
    load_texts,
)
from rto_megatron.data.other_layouts import Examples
from rto_megatron.data.sources import HUB_NAME, BadRow, is_file, scan_rows
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
        if is_file(self.source):
            return None if Path(self.source).is_file() else "not on this machine"
        return "on the hub" if HUB_NAME.fullmatch(self.source) else None


def data_sources(config: schema.Stage) -> list[DataSource]:
    """Every source of rows that a stage reads."""
    data = config.data
    if isinstance(data, EvaluateDataConfig):
        return [DataSource("data.eval", data.eval, "prompts")]
    if isinstance(data, PromptDataConfig):
        texts = [] if data.pretrain is None else [DataSource("data.pretrain", data.pretrain, "texts")]
        return [DataSource("data.train", data.train, "prompts"), *texts]
    assert isinstance(data, ExampleDataConfig)
    method = ALGORITHMS[config.stage]
    assert isinstance(method, OfflineMethod)
    named = {"data.train": data.train, "data.eval": data.eval}
    return [DataSource(key, source, method.examples) for key, source in named.items() if source is not None]


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
    has_margins = facts_of(config).reads_margins
    source = data.source
    loaded: Loaded[Example]
    match data.wanted:
        case "prompts":
            loaded = load_prompts(source, tokenizer, limits, NUM_ROWS)
        case "pairs":
            loaded = load_pairs(source, tokenizer, limits, NUM_ROWS, eos, has_margins)
        case "demonstrations":
            loaded = load_demonstrations(source, tokenizer, limits, NUM_ROWS, eos)
        case "judgements":  # the rows that follow may answer other prompts
            rows = load_judged_rows(source, tokenizer, limits, NUM_ROWS, eos)
            loaded = Loaded(tuple(chain.from_iterable(rows.items)), rows.report)
        case "texts":
            loaded = load_texts(source, tokenizer, limits, NUM_ROWS)
    warning = over_budget(loaded.items, source, _layout(config))
    return "\n  ".join([loaded.report.summary(), *([] if warning is None else [warning])])


def _layout(config: schema.Stage) -> Layout:
    batch, parallel = config.batch, config.parallel
    row_multiple = parallel.tensor if parallel.sequence else 1
    return Layout(batch.micro, batch.packed, row_multiple, torch.device("cpu"), batch.tokens)


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
