"""Sequences of the longest length that a recipe admits: what a simulated step reads."""

import math
from dataclasses import dataclass

from rto_megatron.config.plan import StagePlan
from rto_megatron.data.cut import Layout
from rto_megatron.data.grouping import Extent
from rto_megatron.types import (
    Demonstration,
    EndOfSequence,
    JudgedResponse,
    PreferencePair,
    Rollout,
)

EOS = EndOfSequence(ids=(0,), written=0)
_TOKEN = 1


@dataclass(frozen=True)
class MadeStep:
    """How many sequences of which length a replica of the policy reads.

    Example:
        MadeStep(num_items=8, per_microbatch=4, per_reading=4, prompt=1024, response=1024, is_pair=False)
    """

    num_items: int  # sequences, or pairs
    per_microbatch: int
    # Sequences of a micro-batch of a reference, which reads the answers of a pair one by one.
    per_reading: int
    prompt: int
    response: int
    is_pair: bool

    @property
    def num_microbatches(self) -> int:
        """Of the policy's replica; all are full."""
        return self.num_items // self.per_microbatch

    @property
    def row_tokens(self) -> int:
        """Tokens of one sequence."""
        return self.prompt + self.response

    def rollouts(self) -> list[Rollout]:
        """Responses that ended."""
        return [
            Rollout(
                f"made-{number}",
                (_TOKEN,) * self.prompt,
                (*(_TOKEN,) * (self.response - 1), EOS.written),
                (-1.0,) * self.response,
                "stop",
                weight_version=0,
            )
            for number in range(self.num_items)
        ]

    def demonstrations(self) -> list[Demonstration]:
        """Texts whose second half is learnt."""
        return [Demonstration(f"made-{n}", self._first, self._second) for n in range(self.num_items)]

    def pairs(self) -> list[PreferencePair]:
        """Answers of one length."""
        return [
            PreferencePair(f"made-{n}", self._first, self._second, self._second, margin=1.0)
            for n in range(self.num_items)
        ]

    def judged(self) -> list[JudgedResponse]:
        """Good and bad answers in turn."""
        return [
            JudgedResponse(f"made-{n}", self._first, self._second, n % 2 == 0, self._second)
            for n in range(self.num_items)
        ]

    @property
    def _first(self) -> tuple[int, ...]:
        return (_TOKEN,) * self.prompt

    @property
    def _second(self) -> tuple[int, ...]:
        return (_TOKEN,) * self.response


def made_step(plan: StagePlan, layout: Layout, most_microbatches: int) -> MadeStep:
    """As few full micro-batches as show the peak, at most those of the recipe.

    Args:
        layout: of the policy's micro-batches.
        most_microbatches: at most so many.
    """
    facts = plan.facts
    longest, _ = facts.longest_sequence
    prompt = longest // 2
    if facts.online is not None:
        prompt = facts.online.data.max_prompt_tokens
    lengths = (longest, longest) if facts.reads_pairs else (longest,)
    per_microbatch = _fitting(Extent.of(lengths), layout)
    per_reading = _fitting(Extent.of(lengths[:1]), layout)
    group = 1 if facts.online is None else facts.online.algorithm.samples_per_prompt
    # Every replica of every role gets full micro-batches alone, those of interleaved stages as many as need no filling,
    # and prompts their whole group of responses.
    layouts = [plan.layout_of(role.name) for role in plan.roles]
    turns = [one.pipeline if one.virtual > 1 else 1 for one in layouts]
    shares = math.lcm(
        *(_share(plan.layout.data, one.data) * turn for one, turn in zip(layouts, turns, strict=True))
    )
    readings = per_reading // math.gcd(per_reading, len(lengths))
    unit = math.lcm(per_microbatch * shares, readings * shares, group)
    wanted = min(most_microbatches, max(1, plan.batches.train_per_rank // per_microbatch))
    num_items = unit * -(-wanted * per_microbatch // unit)
    return MadeStep(num_items, per_microbatch, per_reading, prompt, longest - prompt, facts.reads_pairs)


def _fitting(extent: Extent, layout: Layout) -> int:
    """Items of a full micro-batch."""
    if layout.micro is not None:
        return layout.micro
    assert layout.tokens is not None, "one of both says how"
    many, more = 1, extent + extent
    while layout.size(more) <= layout.tokens:
        many, more = many + 1, more + extent
    return many


def _share(of_policy: int, of_role: int) -> int:
    """How many items of each replica of the policy give each replica of a role a whole number."""
    return of_role // math.gcd(of_policy, of_role)
