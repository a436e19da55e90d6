"""Builds what pays the responses of a run, as the section `rewards` says."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rto_megatron.config import schema
from rto_megatron.config.checks import refuse
from rto_megatron.config.reward_code import missing_packages, running_code
from rto_megatron.config.rewards import FunctionSource, ModelSource, OverlongSource, ServiceSource, Source
from rto_megatron.data.sample_reader import SampleReader
from rto_megatron.errors import DataError
from rto_megatron.reporting.progress import say
from rto_megatron.rewards.raters import Outside, rater_of
from rto_megatron.trainer.reward_source import OutsideReward, OverlongReward, RewardSource
from rto_megatron.trainer.reward_sum import RewardSum, Term, alone
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import Columns, Prompt


def build_rewards(
    config: schema.Rewarded,
    setup: Setup,
    prompts: Sequence[Prompt],
    group_size: int,
    model: Callable[[], RewardSource],
) -> RewardSum:
    """The sources of a run, started; all ranks must call it.

    Args:
        prompts: all that the run may sample from, with the columns that the sources read.
        group_size: responses to a prompt.
        model: builds the reward model.

    Raises:
        UserError: on every rank; a source cannot be started.
    """
    if not config.rewards:
        return alone(model(), setup.topology)
    refuse(missing_packages(config.rewards))
    for line in running_code(config.rewards):
        say(line, setup.topology.is_lead)
    reader = SampleReader(setup.tokenizer, columns_of(prompts))
    terms = [_term(source, config, setup, reader, model) for source in config.rewards]
    return RewardSum(tuple(terms), group_size, setup.topology)


def columns_of(prompts: Sequence[Prompt]) -> Mapping[tuple[str, tuple[int, ...]], Columns]:
    """Id and tokens of a prompt -> columns.

    Raises:
        DataError: two rows of one id and prompt say different things, so nobody knows which a response belongs to.
    """
    found: dict[tuple[str, tuple[int, ...]], Columns] = {}
    for prompt in prompts:
        if found.setdefault((prompt.id, prompt.token_ids), prompt.columns) != prompt.columns:
            raise DataError(
                f"data.train or data.eval: two rows have the id {prompt.id!r}, the same prompt and different columns, "
                "which rewards read; give every row a prompt_id (or id) of its own"
            )
    return found


def _term(
    source: Source,
    config: schema.Rewarded,
    setup: Setup,
    reader: SampleReader,
    model: Callable[[], RewardSource],
) -> Term:
    overlong = partial(
        OverlongReward, config.sampling.max_response_tokens, device=setup.topology.device.torch_device
    )
    if isinstance(source, OverlongSource):
        return Term(source.name, overlong(source.buffer_tokens), source.weight, clip=source.clip)
    buffer = source.overlong_buffer_tokens
    return Term(
        source.name,
        model() if isinstance(source, ModelSource) else _outside(source, setup, reader),
        source.weight,
        source.normalize,
        source.clip,
        None if buffer is None else overlong(buffer),
    )


def _outside(source: Outside, setup: Setup, reader: SampleReader) -> OutsideReward:
    pays_tokens = isinstance(source, FunctionSource | ServiceSource) and source.pays != "response"
    return OutsideReward(partial(rater_of, source), reader, setup.topology, pays_tokens)
