"""What the rewards of a recipe give answers that are there already: no model, pool or rank is needed for that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

from transformers import PreTrainedTokenizerBase

from rto_megatron.config import schema
from rto_megatron.config.checks import refuse
from rto_megatron.config.reward_code import missing_packages
from rto_megatron.config.rewards import ModelSource, OverlongSource
from rto_megatron.data.encoder import Encoder
from rto_megatron.data.layouts import DEMONSTRATIONS
from rto_megatron.data.limits import limits_of
from rto_megatron.data.load_report import Loaded, LoadReport
from rto_megatron.data.loading import load_rows
from rto_megatron.data.row import Row
from rto_megatron.data.rows import json_columns, row_id
from rto_megatron.data.sample_reader import SampleReader
from rto_megatron.errors import DataError, RecipeError
from rto_megatron.rewards.given import listed
from rto_megatron.rewards.raters import rater_of
from rto_megatron.rewards.sample import Sample
from rto_megatron.types import EndOfSequence, Rollout


@dataclass(frozen=True)
class RatedAnswer:
    """An answer, and what each source of rewards gave it; where a source pays tokens, their sum.

    Example:
        RatedAnswer(sample, {"short": -0.3}).given["short"]
    """

    sample: Sample
    given: Mapping[str, float]


def rate_answers(
    config: schema.Rewarded,
    tokenizer: PreTrainedTokenizerBase,
    eos: EndOfSequence,
    answers: str,
    num_rows: int,
) -> tuple[list[RatedAnswer], LoadReport]:
    """Has the functions, services and verifiers of a recipe rate the first answers of a file, in their order; says
    what became of its rows too.

    They see each answer as in a run: cut to `sampling.max_response_tokens`, with the columns of its row. What they give
    is shown before weights, clips and all else that a run does to it.

    Args:
        tokenizer: the policy's.
        eos: what ends an answer of the policy.
        answers: rows in a layout of demonstrations or of pairs, of which the chosen answer is read.

    Raises:
        UserError: a row cannot be read, a source fails or gives what is no number, or there is none that rates without
            the models of a run.
    """
    sources = [one for one in config.rewards if not isinstance(one, ModelSource | OverlongSource)]
    if not sources:
        raise RecipeError(
            "rewards: there is no function, service or verifier among its sources, and a reward model rates in a "
            "stage alone; name a source of your own (docs/rewards.md), or run the stage evaluate"
        )
    refuse(missing_packages(tuple(sources)))
    loaded = _samples(config, tokenizer, eos, answers, num_rows)
    samples = loaded.items
    given: list[dict[str, float]] = [{} for _ in samples]
    for source in sources:
        for row, one in zip(given, rater_of(source).rate(samples), strict=True):
            row[source.name] = one if isinstance(one, float) else sum(one)
    _require_numbers(samples, given)
    return [RatedAnswer(sample, row) for sample, row in zip(samples, given, strict=True)], loaded.report


def _require_numbers(samples: Sequence[Sample], given: Sequence[Mapping[str, float]]) -> None:
    """A run skips every step with such a reward, and none of the shown means and orders would hold."""
    for name in given[0]:
        bad = [
            sample.prompt_id for sample, row in zip(samples, given, strict=True) if not isfinite(row[name])
        ]
        if bad:
            raise DataError(
                f"rewards.{name}: gave a reward that is NaN or infinite to {listed(bad)}, of {len(given)}; a run skips "
                "each step that has one: mend the source"
            )


def _samples(
    config: schema.Rewarded,
    tokenizer: PreTrainedTokenizerBase,
    eos: EndOfSequence,
    answers: str,
    num_rows: int,
) -> Loaded[Sample]:
    # `data.layout` decides among layouts of prompts, and these rows hold answers.
    encoder = Encoder(tokenizer, replace(limits_of(config), layout=None), eos, closes_cut_answers=False)

    def read(row: Row) -> Sample | None:
        exchange = encoder.example(row, encoder.read(DEMONSTRATIONS, row))
        if exchange is None:
            return None
        prompt_id, prompt_ids = row_id(row), exchange.prompt_ids
        ids = exchange.answer_ids[: config.sampling.max_response_tokens]
        rollout = Rollout(
            prompt_id=prompt_id,
            prompt_ids=prompt_ids,
            response_ids=ids,
            sampled_logprobs=(0.0,) * len(ids),  # nobody sampled them
            finish_reason="stop" if ids[-1] in eos.ids else "length",
            weight_version=0,
        )
        return SampleReader(tokenizer, {(prompt_id, prompt_ids): json_columns(row)}).sample(rollout)

    return load_rows(answers, read, encoder, num_rows)
