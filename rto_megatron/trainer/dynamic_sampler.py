"""DAPO's dynamic sampling: a step samples prompts until its batch is full of groups whose scores differ.

A group of equal scores has no advantage: it would only make the batch smaller. What sources pay tokens is part of a
response's score here. Which groups are taken depends on their order among all prompts and not on how replicas share
them: replicas exchange groups where their shares are uneven. What is taken is scored again with everything else, so
that a step's rewards are of its own batch.

Source: arXiv 2503.14476, section 3.2; verl, recipe/dapo (max_num_gen_batches).
"""

from collections.abc import Callable, Sequence
from itertools import batched, chain

from torch import Tensor

from rto_megatron.algorithms.groups import informative
from rto_megatron.algorithms.reinforcement import GroupConfig
from rto_megatron.config import schema
from rto_megatron.errors import DataError
from rto_megatron.parallel.topology import Topology
from rto_megatron.trainer.arrivals import Hear
from rto_megatron.trainer.opinions import Roles
from rto_megatron.trainer.sampler import Sampler, WrappedSampler
from rto_megatron.trainer.scoring import close_rollouts
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import Metrics, Rollout

type Scores = Callable[[Sequence[Rollout]], Tensor]  # of responses as they were sampled, [B]
type Group = list[Rollout]


def full_batches(
    sampler: Sampler,
    config: schema.ReinforcementStage,
    setup: Setup,
    roles: Roles,
    record: Callable[[Metrics], None],
) -> Sampler:
    """The sampler, or where the method asks for full batches one that draws from it until they are."""
    algorithm = config.algorithm
    if not isinstance(algorithm, GroupConfig) or algorithm.max_sampling_rounds is None:
        return sampler

    def scores(drawn: Sequence[Rollout]) -> Tensor:
        roles.memory.enter("judge")
        rewards = roles.reward.rate(close_rollouts(drawn, setup.eos, algorithm.truncated))
        tokens_BR = rewards.source_BR
        return rewards.score_B if tokens_BR is None else rewards.score_B + tokens_BR.sum(dim=1)

    return DynamicSampler(sampler, config, algorithm.max_sampling_rounds, scores, setup.topology, record)


class DynamicSampler(WrappedSampler):
    """Draws several times a step from another sampler, which hands out further prompts each time.

    Args:
        limit: draws that a step may take.
        scores: called on every rank with the same responses of its replica.
        record: takes sums for the logs.

    Example:
        DynamicSampler(sampler, config, 10, scores, topology, run.record)
    """

    def __init__(
        self,
        inner: Sampler,
        config: schema.ReinforcementStage,
        limit: int,
        scores: Scores,
        topology: Topology,
        record: Callable[[Metrics], None],
    ) -> None:
        super().__init__(inner)
        self._limit = limit
        self._num_groups = config.batch.rollout
        self._group_size = config.algorithm.samples_per_prompt
        self._scores = scores
        self._topology = topology
        self._record = record

    def begin(self, step: int, hear: Hear | None = None) -> dict[str, float]:
        """See `Sampler.begin`."""
        return self._inner.begin(step)

    def draw(self, step: int, hear: Hear | None = None) -> tuple[Rollout, ...]:
        """See `Sampler.draw`; which responses a step takes is known when all of a round are there.

        Raises:
            DataError: on every rank; the limit was reached before the batch was full.
        """
        own: list[Group] = []  # this replica's groups that teach something
        places: list[
            tuple[int, int]
        ] = []  # (replica, index among its own) of all of them, in the order of the prompts
        for number in range(1, self._limit + 1):
            groups, is_informative = self._judged(self._inner.draw(step))
            shares = self._topology.gather(is_informative, list[bool])
            num_taken = [
                sum(replica == data_rank for replica, _ in places) for data_rank in range(len(shares))
            ]
            # Prompts are dealt to the replicas in turn.
            for flags in zip(*shares, strict=True):
                for replica, is_taken in enumerate(flags):
                    if is_taken:
                        places.append((replica, num_taken[replica]))
                        num_taken[replica] += 1
            own += [group for group, is_taken in zip(groups, is_informative, strict=True) if is_taken]
            self._record({"rollout/informative_fraction": (sum(is_informative), len(is_informative))})
            if len(places) >= self._num_groups:
                self._record({"rollout/sampling_rounds": (number, 1.0)})
                return tuple(chain.from_iterable(self._dealt(own, places[: self._num_groups])))
        raise DataError(self._complaint(step, len(places)))

    def _judged(self, drawn: Sequence[Rollout]) -> tuple[list[Group], list[bool]]:
        groups = [list(group) for group in batched(drawn, self._group_size)]
        flags: list[bool] = informative(self._scores(drawn), self._group_size).tolist()
        return groups, flags

    def _dealt(self, own: list[Group], places: Sequence[tuple[int, int]]) -> list[Group]:
        """This replica's share of the chosen groups, every n-th of them; all ranks must call it."""
        topology = self._topology
        mine = places[topology.data_rank :: topology.data_size]
        if all(replica == place % topology.data_size for place, (replica, _) in enumerate(places)):
            return [own[index] for _, index in mine]
        chosen = [own[index] for replica, index in places if replica == topology.data_rank]
        by_replica = topology.gather(chosen, list[list[Rollout]])
        first = [0] * topology.data_size
        found = {}
        for replica, index in places:
            found[replica, index] = by_replica[replica][first[replica]]
            first[replica] += 1
        return [found[place] for place in mine]

    def _complaint(self, step: int, num_found: int) -> str:
        return (
            f"step {step + 1}: {num_found} of {self._num_groups} prompts have responses whose scores differ, after "
            f"algorithm.max_sampling_rounds={self._limit} rounds of {self._num_groups} prompts each, and nothing was "
            "trained on. Take prompts that the policy answers well only sometimes, raise algorithm.max_sampling_rounds "
            "or algorithm.samples_per_prompt, lower batch.rollout, or set max_sampling_rounds to null to train on all"
        )
