"""How replicas share a step's rollouts by what they cost, to score them and to train on them.

The length of a response is known when it has been sampled. Then every replica learns of all rollouts and takes groups
that cost about as much as those of each other replica; responses to one prompt stay together, since credit compares
them. When credit is assigned every replica learns of all rows, and each optimizer step is shared out by itself, by
single responses or by those of a prompt together. Where micro-batches go by number a replica keeps what it sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched, chain

import torch

from rto_megatron.algorithms.termination import TruncationPolicy
from rto_megatron.data.budget import beyond_budget
from rto_megatron.data.grouping import deal
from rto_megatron.reporting.progress import say
from rto_megatron.trainer.pool_requests import in_order_of_prompts
from rto_megatron.trainer.prompt_groups import cost_together
from rto_megatron.trainer.scoring import close_rollouts
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import Rollout, TrainingRows


@dataclass(frozen=True)
class DealtRollouts:
    """What a replica scores of a step's rollouts, and where it stands among all of them.

    Example:
        dealt = deal_rollouts(sampler.draw(step), 8, setup, step + 1)
        scored = scorer.score(dealt.own, step + 1)
    """

    everyone: tuple[Rollout, ...]  # that this replica knows, in the order of the prompts
    places: tuple[int, ...]  # among them, of those that it scores

    @property
    def own(self) -> tuple[Rollout, ...]:
        """What this replica scores, in the order of the prompts."""
        return tuple(self.everyone[place] for place in self.places)

    def rows(self, experience: TrainingRows, truncated: TruncationPolicy, setup: Setup) -> TrainingRows:
        """The rows of everyone, on every rank; all ranks must call it.

        Args:
            experience: of `own`, closed by the policy `truncated`.
        """
        if len(self.places) == len(self.everyone):
            return experience
        rollouts = close_rollouts(self.everyone, setup.eos, truncated)
        of = experience
        grids = of.mask_BR, of.logp_old_BR, of.logp_ref_BR, of.pool_importance_BR, of.values_BR
        own_KBR = torch.stack([*grids, of.advantages_BR, of.returns_BR])
        width = max(len(rollout.response_ids) for rollout in rollouts)
        all_KBR = own_KBR.new_zeros(len(own_KBR), len(rollouts), width)
        all_KBR[:, list(self.places), : own_KBR.shape[2]] = own_KBR
        # Each row is one replica's: a sum with zeros is the number itself.
        mask, logp_old, logp_ref, importance, values, advantages, returns = setup.topology.dp_sum(all_KBR)
        return TrainingRows(
            rollouts, mask, logp_old, logp_ref, importance, values, advantages, returns, experience.drawn
        )


def deal_rollouts(sampled: Sequence[Rollout], group_size: int, setup: Setup, step: int) -> DealtRollouts:
    """Shares out what all replicas sampled; all ranks must call it.

    Args:
        sampled: by this replica, in the order of its prompts; as many on every replica.
        group_size: responses to a prompt.
        step: counted from 1, for the warning that a rollout is longer than a micro-batch may be.
    """
    topology, cost = setup.topology, setup.cost
    if cost is None:
        return DealtRollouts(tuple(sampled), tuple(range(len(sampled))))
    everyone = in_order_of_prompts(sampled, group_size, topology)
    warning = beyond_budget(everyone, setup.layout)
    say(f"warning: step {step}: of the rollouts {warning}", topology.is_lead and warning is not None)
    by_group = batched(everyone, group_size)
    if setup.layout.shares_prompts:
        groups = [cost_together(group, cost) for group in by_group]
    else:
        groups = [sum(map(cost, group)) for group in by_group]
    own = deal(groups, topology.data_size)[topology.data_rank]
    places = chain.from_iterable(range(group * group_size, (group + 1) * group_size) for group in own)
    return DealtRollouts(everyone, tuple(places))
