"""What a stage takes of its data: lengths, bad rows, the layout that decides, the arguments of the chat template."""

from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.config import schema
from rto_megatron.config.facts import facts_of
from rto_megatron.config.inputs import DemonstrationDataConfig, ExampleDataConfig
from rto_megatron.data.layouts import READERS
from rto_megatron.data.reading import Examples
from rto_megatron.data.template import TemplateOptions
from rto_megatron.errors import RecipeError

MIN_ANSWER_TOKENS = 2  # an answer of one token would be nothing but the end of the sequence


@dataclass(frozen=True)
class Limits:
    """Length limits in tokens, what happens to a prompt over its limit and to a row that cannot be used, which layout
    decides for rows that are in several, and how conversations are rendered.

    Example:
        Limits(max_prompt_tokens=512, max_length=1024, overlong="drop")
    """

    max_prompt_tokens: int
    max_length: int  # prompt and answer together; prompts without answers ignore it
    overlong: Literal["error", "drop", "truncate_left"]
    bad_rows: Literal["error", "drop"] = "error"
    template: TemplateOptions = field(default_factory=TemplateOptions)
    layout: str | None = None
    loss_on: Literal["last", "all"] = "last"  # of the assistant's turns of a demonstration
    empty_thoughts: Literal["learn", "skip"] = "learn"  # of a demonstration

    def __post_init__(self) -> None:
        if self.max_length <= MIN_ANSWER_TOKENS:
            raise RecipeError(
                f"data.max_length = {self.max_length} leaves no room for a prompt and an answer of "
                f"{MIN_ANSWER_TOKENS} tokens; raise it"
            )


def limits_of(config: schema.Stage, moment: datetime | None = None) -> Limits:
    """What a stage takes of its data; prompts that are to be answered leave room for the response.

    Args:
        moment: of the run's start; None: templates that print the date print today's.

    Raises:
        RecipeError: data.layout is none of the layouts of the stage's data.
    """
    data = config.data
    require_layout(data.layout, wanted_examples(config))
    template = TemplateOptions(data.template, moment)
    length, _ = facts_of(config).longest_sequence
    if isinstance(data, ExampleDataConfig):
        template = TemplateOptions(data.template, moment, data.open_thought, data.allow_non_prefix)
    limits = Limits(data.max_prompt_tokens, length, data.overlong, data.bad_rows, template, data.layout)
    if isinstance(data, DemonstrationDataConfig):
        return replace(limits, loss_on=data.loss_on, empty_thoughts=data.empty_thoughts)
    return limits


def wanted_examples(config: schema.Stage) -> Examples:
    """What the rows of a stage's data have to hold."""
    method = ALGORITHMS.get(config.stage)
    return method.examples if isinstance(method, OfflineMethod) else "prompts"


def require_layout(name: str | None, examples: Examples) -> None:
    """Refuses a name that no layout of such examples has.

    Raises:
        RecipeError: names them all.
    """
    known = [layout.name for layout in READERS[examples].layouts]
    if name is not None and name not in known:
        raise RecipeError(
            f"data.layout={name} is no layout of {examples}, which are {', '.join(known)}; leave it out where rows are "
            "in one layout"
        )
