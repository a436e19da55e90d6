"""What the models say of responses, micro-batch by micro-batch: forwards without gradients.

T  positions of one micro-batch | S  its sequences
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from rto_megatron.data.cut import CutSequences, Layout
from rto_megatron.data.packing import rollout_grid
from rto_megatron.engine.absent import FrozenRole, TrainedRole
from rto_megatron.engine.offload import HostMemory
from rto_megatron.trainer.reward_sum import RewardSum
from rto_megatron.trainer.role_shares import RoleShares
from rto_megatron.types import Distribution, Rollout, TokenBatch, TrainerSample

_ONE_IN = 16  # responses: what the gap to the pool is measured on costs a sixteenth of what is saved


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
    logp_T: Tensor  # of the policy, float32, nats; zeros where it was not asked
    logp_ref_T: Tensor
    dpo_logratio_T: Tensor
    values_T: Tensor
    scores: Mapping[str, Tensor]  # reward model by the name of its source -> float32 [S]


type Group = tuple[Rollout, ...]  # the responses of a micro-batch, as they are trained on
type Opinions = Mapping[Group, Opinion]  # keyed by `known_as`


def known_as(group: Group) -> Group:
    """The responses without the pool's log-probs, which no model reads, and of which a NaN would equal nothing."""
    return tuple(replace(rollout, sampled_logprobs=()) for rollout in group)


def opinions(
    rollouts: Sequence[Rollout],
    roles: Roles,
    layout: Layout,
    drawn: Distribution,
    is_policy_asked: bool = True,
) -> Opinions:
    """Asks all models; all ranks of the replica must call it with the same rollouts, and where a model has a layout of
    its own all ranks.

    Args:
        rollouts: closed by the truncation policy; whole micro-batches, of which the last may be smaller.
        drawn: what policy and reference are compared as.
        is_policy_asked: False where the pool speaks for it.
    """
    rewards = roles.reward.models()
    asked_policy = roles.policy if is_policy_asked else None
    asked = [asked_policy, roles.reference, roles.dpo_reference, roles.dpo, roles.critic]
    readers = [model for model in (*asked, *(one.model for one in rewards.values())) if model is not None]
    shares = RoleShares(rollouts, layout, [model.topology for model in readers])
    cut = shares.cut(drawn)
    # Forwards come first, and what they gave is told afterwards: models on different ranks work at the same time.
    policy = None if asked_policy is None else shares.begin(asked_policy, drawn)
    if roles.dpo is not None and any(one is roles.reference for one in (roles.dpo, _base(roles))):
        shares.begin_both(roles.reference, drawn)
    reference = shares.begin(roles.reference, drawn)
    dpo = None if roles.dpo is None else _begin_dpo(roles.dpo, roles, shares)
    critic = None if roles.critic is None else shares.begin(roles.critic, drawn)
    judged = {name: one.begin(shares.of(one.model.topology)) for name, one in rewards.items()}
    logp_ref = reference()
    zeros = [torch.zeros_like(one) for one in logp_ref]
    logp = zeros if policy is None else policy()
    dpo_logratio = zeros if dpo is None else dpo()
    values = zeros if critic is None else critic()
    scores = {name: tell() for name, tell in judged.items()}
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


def _base(roles: Roles) -> FrozenRole:
    """What the DPO model was trained from."""
    return roles.dpo_reference or roles.reference


def _begin_dpo(dpo: FrozenRole, roles: Roles, shares: RoleShares) -> Callable[[], list[Tensor]]:
    """The forwards of the DPO reward, of whole distributions; what all ranks call then makes the log-ratio."""
    base, told = shares.begin(_base(roles)), shares.begin(dpo)
    return lambda: [one - other for one, other in zip(told(), base(), strict=True)]


def policy_sample(
    rollouts: Sequence[Rollout], roles: Roles, layout: Layout, drawn: Distribution
) -> TrainerSample:
    """The policy's log-probs of one response in `_ONE_IN`, the first among them; all ranks must call it."""
    rows = list(range(0, len(rollouts), _ONE_IN))
    some = [rollouts[row] for row in rows]
    shares = RoleShares(some, layout, [roles.policy.topology])
    some_BR = rollout_grid(shares.begin(roles.policy, drawn)(), shares.cut(drawn), some)
    width = max(len(rollout.response_ids) for rollout in rollouts)
    logp_BR = some_BR.new_zeros(len(rollouts), width)
    logp_BR[rows, : some_BR.shape[1]] = some_BR
    is_asked_B = torch.zeros(len(rollouts), dtype=torch.bool, device=logp_BR.device)
    is_asked_B[rows] = True
    return TrainerSample(logp_BR, is_asked_B)


def all_opinions(
    rollouts: Sequence[Rollout],
    roles: Roles,
    layout: Layout,
    drawn: Distribution,
    early: Opinions,
    is_policy_asked: bool = True,
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
    known = {**early, **(opinions(late, roles, layout, drawn, is_policy_asked) if late else {})}
    said = [known[name] for name in names]
    return CutSequences([one.batch for one in said], groups), said
