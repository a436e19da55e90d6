"""Every model's opinion of the responses of a step, as grids of response tokens."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rto_megatron.algorithms.losses import keep
from rto_megatron.algorithms.termination import TruncationPolicy, close_response, compared_ban
from rto_megatron.config.rollouts import OldLogprobs, SamplingConfig
from rto_megatron.data.cut import Layout
from rto_megatron.data.packing import padded_rows, response_mask, rollout_grid
from rto_megatron.trainer.opinions import Opinions, Roles, all_opinions, policy_sample
from rto_megatron.types import Distribution, EndOfSequence, Rollout, ScoredRollouts


def close_rollouts(
    rollouts: Sequence[Rollout], eos: EndOfSequence, policy: TruncationPolicy
) -> tuple[Rollout, ...]:
    """Applies the truncation policy to what is trained on."""
    return tuple(
        replace(r, response_ids=close_response(r.response_ids, r.finish_reason, eos, policy)[0])
        for r in rollouts
    )


def drawn_from(eos: EndOfSequence, how: SamplingConfig) -> Distribution:
    """What policy and reference are compared as, see `score`."""
    return Distribution(how.temperature, compared_ban(eos, how.min_response_tokens))


def score(
    sampled: Sequence[Rollout],
    roles: Roles,
    layout: Layout,
    eos: EndOfSequence,
    policy: TruncationPolicy,
    how: SamplingConfig,
    early: Opinions | None = None,
    old: OldLogprobs = "trainer",
) -> ScoredRollouts:
    """Closes what the pool sampled; every model's opinion of it, without gradients; all ranks must call this.

    Policy and reference are compared as the distributions that were sampled from: at that temperature, without
    end-of-sequence where it was banned. The DPO reward is of whole distributions at temperature 1: those that the DPO
    model was trained on, and whose log-ratio is a reward by eq. 4.5.

    Args:
        how: responses were drawn. Where that was from the likeliest tokens alone, the pool's log-probs are of those,
            and not compared.
        early: what the models said already, the same on all ranks of the replica.
        old: whose log-probs are the policy's at rollout time; the pool's must be of the same distribution.
    """
    rollouts = close_rollouts(sampled, eos, policy)
    drawn = drawn_from(eos, how)
    cut, said = all_opinions(rollouts, roles, layout, drawn, early or {}, is_policy_asked=old == "trainer")

    def grid(outputs: Sequence[Tensor]) -> Tensor:
        return rollout_grid(outputs, cut, rollouts)

    logp_ref_BR = grid([one.logp_ref_T for one in said])
    logp_pool_BR = padded_rows([rollout.sampled_logprobs for rollout in sampled], layout.device)
    behind_B = cut.in_order([one.values_T[list(one.batch.last_positions)] for one in said])
    is_cut = [policy == "bootstrap" and rollout.finish_reason == "length" for rollout in rollouts]
    pairs = zip(sampled, rollouts, strict=True)
    sampled_BR = padded_rows([_kept(*pair, how.min_response_tokens) for pair in pairs], layout.device)
    known = {name: cut.in_order([one.scores[name] for one in said]) for name in roles.reward.models()}
    rewards = roles.reward.rate(rollouts, known)
    return ScoredRollouts(
        rollouts=rollouts,
        mask_BR=response_mask(rollouts, layout.device),
        sampled_BR=sampled_BR * how.is_whole,
        logp_pool_BR=logp_pool_BR,
        logp_old_BR=grid([one.logp_T for one in said]) if old == "trainer" else logp_pool_BR,
        logp_ref_BR=logp_ref_BR,
        dpo_logratio_BR=grid([one.dpo_logratio_T for one in said]),
        values_BR=grid([one.values_T for one in said]),
        bootstrap_B=keep(behind_B, torch.tensor(is_cut, device=behind_B.device)),
        score_B=rewards.score_B,
        drawn=drawn,
        source_BR=rewards.source_BR,
        scores_by_source=rewards.given,
        paid_by_source=rewards.paid,
        by_trainer=None if old == "trainer" else policy_sample(rollouts, roles, layout, drawn),
    )


def _kept(sampled: Rollout, closed: Rollout, min_tokens: int) -> list[float]:
    """1 on the tokens that the truncation policy left as they were sampled, and whose log-probs the pool took alike.

    A pool that forbids an empty response leaves end-of-sequence out of its first token's, and `compared_ban` does not.
    """
    first = 1 if min_tokens == 1 else 0
    pairs = zip(sampled.response_ids, closed.response_ids, strict=True)
    return [float(place >= first and token == kept) for place, (token, kept) in enumerate(pairs)]
