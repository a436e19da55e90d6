"""What the models say of responses, micro-batch by micro-batch: forwards without gradients.

T  positions of one micro-batch | S  its sequences
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from rto_megatron.data.cut import CutSequences, Layout
from rto_megatron.engine.absent import FrozenRole, TrainedRole
from rto_megatron.engine.offload import HostMemory
from rto_megatron.trainer.reward_sum import RewardSum
from rto_megatron.trainer.role_shares import RoleShares
from rto_megatron.types import WHOLE, Distribution, Rollout, TokenBatch


@dataclass(frozen=True)
class Roles:
    """The models of a reinforcement method.

    Example:
        roles.policy.shape, roles.reward.rate(rollouts)
    """

    policy: TrainedRole
    average: FrozenRole | None  # of the policy; None where none is kept
    critic: TrainedRole | None  # None: a method without one
    reference: FrozenRole
    reward: RewardSum
    dpo: FrozenRole | None  # None: no DPO reward
    dpo_reference: FrozenRole | None  # None: the reference, whose forward is shared
    memory: HostMemory = field(default_factory=HostMemory)  # what of them waits there


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
    """Asks all models; all ranks of the replica must call it with the same rollouts, and where a model has a layout of
    its own all ranks.

    Args:
        rollouts: closed by the truncation policy; whole micro-batches, of which the last may be smaller.
        drawn: what policy and reference are compared as.
    """
    shares = RoleShares(rollouts, layout)
    cut, say = shares.cut(drawn), shares.outputs
    logp, logp_ref = say(roles.policy, drawn), say(roles.reference, drawn)
    zeros = [torch.zeros_like(one) for one in logp]
    dpo_logratio, values = zeros, zeros
    if roles.dpo is not None:
        is_shared = roles.dpo_reference is None and drawn == WHOLE
        base_logp = logp_ref if is_shared else say(roles.dpo_reference or roles.reference)
        dpo_logratio = [one - other for one, other in zip(say(roles.dpo), base_logp, strict=True)]
    if roles.critic is not None:
        values = say(roles.critic, drawn)
    scores = {name: model.scores(rollouts) for name, model in roles.reward.models().items()}
    return {
        known_as(tuple(rollouts[row] for row in rows)): Opinion(
            cut.batches[number],
            logp[number],
            logp_ref[number],
            dpo_logratio[number],
            values[number],
            {name: scores_B[rows] for name, scores_B in scores.items()},
        )
        for number, rows in enumerate(cut.groups)
    }


def all_opinions(
    rollouts: Sequence[Rollout], roles: Roles, layout: Layout, drawn: Distribution, early: Opinions
) -> tuple[CutSequences, list[Opinion]]:
    """How a batch is cut into micro-batches, and the opinion of each; only those that `early` lacks are asked for.

    Args:
        early: of micro-batches of this batch; none where `layout` cuts by tokens.
    """
    groups = layout.groups_of(rollouts)
    names = [known_as(tuple(rollouts[row] for row in rows)) for rows in groups]
    rows_late = sorted(
        chain.from_iterable(rows for rows, name in zip(groups, names, strict=True) if name not in early)
    )
    late = [rollouts[row] for row in rows_late]
    known = {**early, **(opinions(late, roles, layout, drawn) if late else {})}
    said = [known[name] for name in names]
    return CutSequences([one.batch for one in said], groups), said
