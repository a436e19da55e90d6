"""What the models say of responses, micro-batch by micro-batch: forwards without gradients.

T  positions of one micro-batch | S  its sequences
"""

from collections.abc import Callable, Mapping, Sequence
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
    rewards = roles.reward.models()
    asked = [roles.policy, roles.reference, roles.dpo_reference, roles.dpo, roles.critic]
    readers = [model for model in (*asked, *(one.model for one in rewards.values())) if model is not None]
    shares = RoleShares(rollouts, layout, [model.topology for model in readers])
    cut = shares.cut(drawn)
    # Forwards come first, and what they gave is told afterwards: models on different ranks work at the same time.
    policy, reference = shares.begin(roles.policy, drawn), shares.begin(roles.reference, drawn)
    dpo = None if roles.dpo is None else _begin_dpo(roles.dpo, roles, shares, drawn)
    critic = None if roles.critic is None else shares.begin(roles.critic, drawn)
    judged = {name: one.begin(shares.of(one.model.topology)) for name, one in rewards.items()}
    logp, logp_ref = policy(), reference()
    zeros = [torch.zeros_like(one) for one in logp]
    dpo_logratio = zeros if dpo is None else dpo(logp_ref)
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


def _begin_dpo(
    dpo: FrozenRole, roles: Roles, shares: RoleShares, drawn: Distribution
) -> Callable[[list[Tensor]], list[Tensor]]:
    """The forwards of the DPO reward; what all ranks call then makes the log-ratio.

    It takes the reference's log-probs, and reads them where they are of whole distributions.
    """
    is_shared = roles.dpo_reference is None and drawn == WHOLE
    base = None if is_shared else shares.begin(roles.dpo_reference or roles.reference)
    told = shares.begin(dpo)

    def logratio(logp_ref: list[Tensor]) -> list[Tensor]:
        base_logp = logp_ref if base is None else base()
        return [one - other for one, other in zip(told(), base_logp, strict=True)]

    return logratio


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
