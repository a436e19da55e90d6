"""What the models say of responses, micro-batch by micro-batch: forwards without gradients.

T  positions of one micro-batch | S  its sequences
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import batched, chain

import torch
from torch import Tensor

from rto_megatron.data.packing import Layout, rollout_batches
from rto_megatron.engine.megatron import FrozenModel, TrainedModel
from rto_megatron.trainer.reward_sum import RewardSum
from rto_megatron.types import WHOLE, Distribution, Rollout, TokenBatch


@dataclass(frozen=True)
class Roles:
    """The models of a reinforcement method.

    Example:
        roles.policy.shape, roles.reward.rate(rollouts)
    """

    policy: TrainedModel
    average: FrozenModel | None  # of the policy; None where none is kept
    critic: TrainedModel | None  # None: a method without one
    reference: FrozenModel
    reward: RewardSum
    dpo: FrozenModel | None  # None: no DPO reward
    dpo_reference: FrozenModel | None  # None: the reference, whose forward is shared


@dataclass(frozen=True)
class Opinion:
    """What the models say of one micro-batch; zeros of a DPO model or critic that there is not.

    Example:
        Opinion(batch, logp_T, logp_ref_T, dpo_logratio_T, values_T, scores={})
    """

    batch: TokenBatch
    logp_T: Tensor  # of the policy, float32, nats
    logp_ref_T: Tensor
    dpo_logratio_T: Tensor
    values_T: Tensor
    scores: Mapping[str, Tensor]  # reward model by the name of its source -> float32 [S]


type Group = tuple[Rollout, ...]  # the responses of a micro-batch, as they are trained on
type Opinions = Mapping[Group, Opinion]  # keyed by `known_as`


def known_as(group: Group) -> Group:
    """The responses without the pool's log-probs, which no model reads, and of which a NaN would equal nothing."""
    return tuple(replace(rollout, sampled_logprobs=()) for rollout in group)


def opinions(rollouts: Sequence[Rollout], roles: Roles, layout: Layout, drawn: Distribution) -> Opinions:
    """Asks all models; all ranks of the replica must call it with the same rollouts.

    Args:
        rollouts: closed by the truncation policy; whole micro-batches, of which the last may be smaller.
        drawn: what policy and reference are compared as.
    """
    whole = rollout_batches(rollouts, layout)
    batches = whole if drawn == WHOLE else rollout_batches(rollouts, layout, drawn)
    logp, logp_ref = roles.policy.token_outputs(batches), roles.reference.token_outputs(batches)
    zeros = [torch.zeros_like(one) for one in logp]
    dpo_logratio, values = zeros, zeros
    if roles.dpo is not None:
        is_shared = roles.dpo_reference is None and drawn == WHOLE
        base = logp_ref if is_shared else (roles.dpo_reference or roles.reference).token_outputs(whole)
        dpo_logratio = [one - other for one, other in zip(roles.dpo.token_outputs(whole), base, strict=True)]
    if roles.critic is not None:
        values = roles.critic.token_outputs(batches)
    scores = {name: model.by_microbatch(rollouts) for name, model in roles.reward.models().items()}
    return {
        known_as(group): Opinion(
            batches[number],
            logp[number],
            logp_ref[number],
            dpo_logratio[number],
            values[number],
            {name: by_batch[number] for name, by_batch in scores.items()},
        )
        for number, group in enumerate(batched(rollouts, layout.micro))
    }


def all_opinions(
    rollouts: Sequence[Rollout], roles: Roles, layout: Layout, drawn: Distribution, early: Opinions
) -> list[Opinion]:
    """The opinion of every micro-batch of a batch, in order; only those that `early` lacks are asked for."""
    groups = list(batched(rollouts, layout.micro))
    late = list(chain.from_iterable(group for group in groups if known_as(group) not in early))
    said = {**early, **(opinions(late, roles, layout, drawn) if late else {})}
    return [said[known_as(group)] for group in groups]
