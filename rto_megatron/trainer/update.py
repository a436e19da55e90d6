"""The minibatches of one rollout step's update, in order."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from rto_megatron.algorithms import reinforcement
from rto_megatron.algorithms.losses import Weighting, weighting_of
from rto_megatron.data.cut import Layout
from rto_megatron.data.grouping import deal
from rto_megatron.data.packing import minibatches
from rto_megatron.engine.finite import EmptyUpdateError, refuse_together
from rto_megatron.parallel.topology import Topology
from rto_megatron.trainer.prompt_groups import RolloutCost, by_prompt, shares_of_rows
from rto_megatron.trainer.role_shares import experience_of_all, packed_for
from rto_megatron.types import Minibatch, TrainingRows


@dataclass(frozen=True)
class OptimizerStep:
    """This replica's share of one optimizer step.

    Example:
        OptimizerStep(microbatches, names, microbatches, names, is_empty=False)
    """

    microbatches: list[Minibatch]
    names: list[list[str]]  # ids of the samples of each micro-batch
    of_critic: list[Minibatch]  # what its replica reads: others, where it has a layout of its own
    critic_names: list[list[str]]
    is_empty: bool  # the truncation policy left no replica a token to train on


def optimizer_minibatches(
    experience: TrainingRows,
    config: reinforcement.Config,
    max_response_tokens: int,
    num_minibatches: int,
    topology: Topology,
    layout: Layout,
    seed: int,
    cost: RolloutCost | None = None,
    critic: Topology | None = None,
) -> Iterator[OptimizerStep]:
    """The micro-batches of each optimizer step; equally many steps on every replica.

    The first pass takes rollouts in the order of the prompts, which the loader has shuffled; later passes shuffle.
    Every replica shuffles its own rollouts by the same permutation, so from the second pass on the global
    minibatches depend on the number of replicas. So do those of the first pass where a replica's share of an optimizer
    step is no multiple of the responses to a prompt. Where every replica has all rows, one permutation shuffles those,
    and minibatches are the same for any number of replicas.

    Args:
        experience: the rollouts of this replica, or with `cost` those of all replicas, on each.
        max_response_tokens: the longest response that could be sampled; in the denominator of `constant` weights.
        num_minibatches: optimizer steps per pass; divides the rollouts of every replica.
        seed: of the shuffles.
        cost: of a rollout, by which replicas share out each optimizer step; None: each takes its own.
        critic: its layout; None: the policy's.
    """
    reader = critic or topology
    is_known = reader.home is None or cost is not None
    everyone = experience if is_known else experience_of_all(experience, topology)
    weighting = weighting_of(config.loss_weights, max_response_tokens)
    size = len(experience.rollouts) // num_minibatches
    order = list(range(size * num_minibatches))
    for epoch in range(config.epochs):
        if epoch:
            random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, len(order), size):
            taken = order[start : start + size]
            rows = (
                taken
                if cost is None
                else _own_share(experience, taken, topology, cost, layout.shares_prompts)
            )
            mask_BR = experience.mask_BR[rows]
            total = float(topology.dp_sum(weighting.count(mask_BR)))
            own = of_critic = _microbatches(experience, rows, weighting, total, layout)
            if reader.home is not None:
                starts = range(0, len(everyone.rollouts), len(experience.rollouts))
                step = [first + row for first in starts for row in taken]
                theirs = packed_for(reader, layout)
                share = _own_share(everyone, step, reader, cost, theirs.shares_prompts)
                of_critic = _microbatches(everyone, share, weighting, total, theirs)
            yield OptimizerStep(*own, *of_critic, is_empty=total == 0)


def _own_share(
    experience: TrainingRows,
    rows: Sequence[int],
    reader: Topology,
    cost: RolloutCost | None,
    shares_prompts: bool,
) -> list[int]:
    """Of some rows of everyone, those of this replica of a layout: by cost, or in turn."""
    if cost is None:
        return list(rows[reader.data_rank :: reader.data_size])
    if shares_prompts:
        return shares_of_rows(experience.rollouts, rows, reader.data_size, cost)[reader.data_rank]
    costs = [cost(experience.rollouts[row]) for row in rows]
    return [rows[number] for number in deal(costs, reader.data_size)[reader.data_rank]]


def _microbatches(
    experience: TrainingRows,
    rows: Sequence[int],
    weighting: Weighting,
    total: float,
    layout: Layout,
) -> tuple[list[Minibatch], list[list[str]]]:
    """Micro-batches of some rows, and the ids of the samples of each."""
    if layout.shares_prompts:
        rows = list(chain.from_iterable(by_prompt(experience.rollouts, rows)))
    weights_BR = experience.mask_BR.new_zeros(experience.mask_BR.shape)
    weights_BR[rows] = weighting.weights(experience.mask_BR[rows], total)
    return minibatches(experience, weights_BR, rows, layout), _names(experience, rows, layout)


def require_tokens(step: OptimizerStep, topology: Topology) -> None:
    """Refuses a step without tokens, in which momentum alone would move the weights; all ranks must call it.

    Raises:
        EmptyUpdateError: on every rank.
    """
    if step.is_empty:
        ids = [name for group in step.names for name in group]
        found = {"every response is cut and algorithm.truncated=mask trains on none": ids}
        refuse_together(found, topology, EmptyUpdateError)


def _names(experience: TrainingRows, rows: Sequence[int], layout: Layout) -> list[list[str]]:
    rollouts = [experience.rollouts[row] for row in rows]
    return [[rollouts[number].prompt_id for number in group] for group in layout.groups_of(rollouts)]
