"""Every model's opinion of sampled responses: the forwards behind a step's rewards, without gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rto_megatron.algorithms.losses import keep
from rto_megatron.algorithms.termination import TruncationPolicy, close_response, compared_ban
from rto_megatron.data.cut import CutSequences, Layout
from rto_megatron.data.packing import response_mask, rollout_batches, rollout_grid
from rto_megatron.engine.megatron import FrozenModel, Model, TrainedModel
from rto_megatron.engine.offload import HostMemory
from rto_megatron.trainer.reward_sum import RewardSum
from rto_megatron.types import (
    WHOLE,
    Distribution,
    EndOfSequence,
    Rollout,
    ScoredRollouts,
)


@dataclass(frozen=True)
class Roles:
    """The models of a reinforcement method.

    Example:
        roles.policy.shape, roles.reward.scores(rollouts)
    """

    policy: TrainedModel
    average: FrozenModel | None  # of the policy; None where none is kept
    critic: TrainedModel | None  # None: a method without one
    reference: FrozenModel
    reward: RewardSum
    dpo: FrozenModel | None  # None: no DPO reward
    dpo_reference: FrozenModel | None  # None: the reference, whose forward is shared
    memory: HostMemory = field(default_factory=HostMemory)  # what of them waits there


def close_rollouts(
    rollouts: Sequence[Rollout], eos: EndOfSequence, policy: TruncationPolicy
) -> tuple[Rollout, ...]:
    """Applies the truncation policy to what is trained on."""
    return tuple(
        replace(r, response_ids=close_response(r.response_ids, r.finish_reason, eos, policy)[0])
        for r in rollouts
    )


def score(
    sampled: Sequence[Rollout],
    roles: Roles,
    layout: Layout,
    eos: EndOfSequence,
    policy: TruncationPolicy,
    min_tokens: int,
    temperature: float = 1.0,
    is_whole: bool = True,
) -> ScoredRollouts:
    """Closes what the pool sampled; every model's opinion of it, without gradients; all ranks must call this.

    Policy and reference are compared as the distributions that were sampled from: at that temperature, without
    end-of-sequence where it was banned. The DPO reward is of whole distributions at temperature 1: those that the DPO
    model was trained on, and whose log-ratio is a reward by eq. 4.5.

    Args:
        min_tokens: end-of-sequence was forbidden before this many tokens of a response.
        temperature: that the pool sampled at.
        is_whole: False where the pool sampled from the likeliest tokens alone; its log-probs are then of those, and not
            compared.
    """
    rollouts = close_rollouts(sampled, eos, policy)
    drawn = Distribution(temperature, compared_ban(eos, min_tokens))
    whole = rollout_batches(rollouts, layout)
    cut = whole if drawn == WHOLE else rollout_batches(rollouts, layout, drawn)

    def grid(model: Model, of: CutSequences) -> Tensor:
        return rollout_grid(model.token_outputs(of.batches), of, rollouts)

    logp_old_BR = grid(roles.policy, cut)
    logp_ref_BR = grid(roles.reference, cut)
    dpo_logratio_BR = torch.zeros_like(logp_ref_BR)
    if roles.dpo is not None:
        is_shared = roles.dpo_reference is None and drawn == WHOLE
        dpo_reference_BR = logp_ref_BR if is_shared else grid(roles.dpo_reference or roles.reference, whole)
        dpo_logratio_BR = grid(roles.dpo, whole) - dpo_reference_BR
    values_BR, bootstrap_B = _values(rollouts, roles.critic, cut, logp_ref_BR, policy == "bootstrap")
    pairs = zip(sampled, rollouts, strict=True)
    rewards = roles.reward.rate(rollouts)
    return ScoredRollouts(
        rollouts=rollouts,
        mask_BR=response_mask(rollouts, layout.device),
        sampled_BR=_padded([_kept(*pair, min_tokens) for pair in pairs], logp_old_BR) * is_whole,
        logp_pool_BR=_padded([rollout.sampled_logprobs for rollout in sampled], logp_old_BR),
        logp_old_BR=logp_old_BR,
        logp_ref_BR=logp_ref_BR,
        dpo_logratio_BR=dpo_logratio_BR,
        values_BR=values_BR,
        bootstrap_B=bootstrap_B,
        score_B=rewards.score_B,
        drawn=drawn,
        source_BR=rewards.source_BR,
        scores_by_source=rewards.given,
        paid_by_source=rewards.paid,
    )


def _kept(sampled: Rollout, closed: Rollout, min_tokens: int) -> list[float]:
    """1 on the tokens that the truncation policy left as they were sampled, and whose log-probs the pool took alike.

    A pool that forbids an empty response leaves end-of-sequence out of its first token's, and `compared_ban` does not.
    """
    first = 1 if min_tokens == 1 else 0
    pairs = zip(sampled.response_ids, closed.response_ids, strict=True)
    return [float(place >= first and token == kept) for place, (token, kept) in enumerate(pairs)]


def _padded(rows: Sequence[Sequence[float]], like_BR: Tensor) -> Tensor:
    """Rows of one number per response token as a grid, 0 behind their ends."""
    width = like_BR.shape[1]
    return like_BR.new_tensor([[*row, *([0.0] * (width - len(row)))] for row in rows])


def _values(
    rollouts: Sequence[Rollout],
    critic: TrainedModel | None,
    cut: CutSequences,
    like_BR: Tensor,
    is_bootstrapped: bool,
) -> tuple[Tensor, Tensor]:
    """Values of the states before the actions [B, R], and of the state behind each cut response [B]."""
    if critic is None:
        return torch.zeros_like(like_BR), torch.zeros_like(like_BR[:, 0])
    values = critic.token_outputs(cut.batches)
    behind_B = cut.in_order([v[list(b.last_positions)] for v, b in zip(values, cut.batches, strict=True)])
    is_cut = [is_bootstrapped and rollout.finish_reason == "length" for rollout in rollouts]
    bootstrap_B = keep(behind_B, torch.tensor(is_cut, device=behind_B.device))
    return rollout_grid(values, cut, rollouts), bootstrap_B
