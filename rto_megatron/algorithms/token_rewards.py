"""The reward of every response token, from what the models said about it.

Legend: B responses, R response positions, right-padded. `mask_BR` is 1 on actions. Log-probs are in nats.
A method composes the reward model's score, the KL penalty and the DPO reward, and chooses the tokens on which the DPO
reward is paid. beta_3 of eq. 4.7 is 1, as in the paper.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rto_megatron.algorithms.losses import keep
from rto_megatron.algorithms.termination import TruncationPolicy
from rto_megatron.types import ScoredRollouts, TokenRewards


def dpo_token_reward(logratio_BR: Tensor, mask_BR: Tensor, beta_dpo: float, dpo_clip: float | None) -> Tensor:
    """beta_1 log(pi_dpo / pi_ref) of each token, scaled first and clipped second, shape [B, R].

    Args:
        logratio_BR: log pi_dpo - log pi_dpo_reference of the sampled tokens, nats, shape [B, R].
        mask_BR: 1 on actions, end-of-sequence included.
        beta_dpo: the paper's beta_1; 0 is exactly off, whatever the log-ratio holds.
        dpo_clip: bound of the absolute value after scaling; None: no bound.

    Source: eq. 4.7; RTO released code, ppo_utils/experience_maker.py:_compute_dpo_rewards (scale, then clip).
    """
    if beta_dpo == 0:
        return torch.zeros_like(logratio_BR)
    reward_BR = keep(beta_dpo * logratio_BR, mask_BR)
    return reward_BR if dpo_clip is None else reward_BR.clamp(-dpo_clip, dpo_clip)


def kl_k1(logp_BR: Tensor, logp_ref_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """log pi - log pi_ref: unbiased estimate of the KL divergence from samples of pi, nats, shape [B, R]."""
    return keep(logp_BR - logp_ref_BR, mask_BR)


def kl_k3(logp_BR: Tensor, logp_ref_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """exp(-k1) - 1 + k1: never negative, of lower variance than k1; for logs and GRPO's loss, nats, same shape."""
    k1_BR = kl_k1(logp_BR, logp_ref_BR, mask_BR)
    return torch.expm1(-k1_BR) + k1_BR


def kl_penalty(logp_BR: Tensor, logp_ref_BR: Tensor, mask_BR: Tensor, kl_coef: float) -> Tensor:
    """- beta_2 log(pi / pi_ref) of each token, with the policy at rollout time, shape [B, R].

    Source: eq. 4.7; OpenRLHF 0.4.4, models/utils.py:compute_reward (k1, frozen into the reward).
    """
    return -kl_coef * kl_k1(logp_BR, logp_ref_BR, mask_BR)


def at_last_token(score_B: Tensor, mask_BR: Tensor) -> Tensor:
    """`score_B` on the last unmasked position of each row, 0 elsewhere, shape [B, R]."""
    positions_R = torch.arange(mask_BR.shape[1], device=mask_BR.device)
    last_B1 = torch.where(mask_BR != 0, positions_R, 0).argmax(dim=1, keepdim=True)
    score_BR = score_B.new_zeros(mask_BR.shape).scatter(1, last_B1, score_B.unsqueeze(1))
    return keep(score_BR, mask_BR)


def truncated_rows(scored: ScoredRollouts) -> Tensor:
    """True for responses that the length limit cut, shape [B]."""
    truncated = [rollout.finish_reason == "length" for rollout in scored.rollouts]
    return torch.tensor(truncated, device=scored.score_B.device)


def response_score(
    scored: ScoredRollouts, score_clip: float | None, truncated: TruncationPolicy, truncated_penalty: float
) -> Tensor:
    """What the whole response is paid, shape [B]: the clamped score, changed by the policy for cut responses.

    The penalty comes after the clamp: a response at the lower bound must still feel it. A bootstrapped response is
    not over and is not paid: the value behind its last token stands for what would come (`ScoredRollouts.bootstrap_B`).

    Args:
        scored: `score_B` is the reward model's score, already normalised.
        score_clip: bound of the absolute value of the score; None: no bound.
        truncated: what happens to responses cut by the length limit.
        truncated_penalty: subtracted from their score under `penalise`.

    Source: OpenRLHF 0.4.4, models/utils.py:compute_reward (clamp to +-10). The policies are this project's own.
    """
    score_B = scored.score_B if score_clip is None else scored.score_B.clamp(-score_clip, score_clip)
    if truncated == "penalise":
        return torch.where(truncated_rows(scored), score_B - truncated_penalty, score_B)
    return keep(score_B, ~truncated_rows(scored)) if truncated == "bootstrap" else score_B


def score_rewards(scored: ScoredRollouts, score_B: Tensor, kl_coef: float) -> TokenRewards:
    """The response's score on its last token and nothing else; `kl_coef` is not used, GRPO's KL is in its loss."""
    nothing_BR = torch.zeros_like(scored.logp_ref_BR)
    score_BR = at_last_token(score_B, scored.mask_BR)
    return TokenRewards(score_BR, dpo_BR=nothing_BR, kl_BR=nothing_BR, num_clipped=score_B.new_zeros(()))


def ppo_rewards(scored: ScoredRollouts, score_B: Tensor, kl_coef: float) -> TokenRewards:
    """PPO's reward: the response's score on its last token, the KL penalty on every token (eq. 2.3)."""
    kl_BR = kl_penalty(scored.logp_old_BR, scored.logp_ref_BR, scored.mask_BR, kl_coef)
    return replace(score_rewards(scored, score_B, kl_coef), kl_BR=kl_BR)


def rto_rewards(
    scored: ScoredRollouts,
    score_B: Tensor,
    kl_coef: float,
    beta_dpo: float,
    dpo_clip: float | None,
    redistribute: "Redistribution",
    beside: "TokenReward" = ppo_rewards,
) -> TokenRewards:
    """PPO's reward and the DPO reward of every token, end-of-sequence included (eq. 4.7).

    Args:
        redistribute: moves the DPO rewards, clipped, to the tokens on which they are paid; `as_it_is` in RTO.
        beside: what else is paid; PPO's reward in RTO.
    """
    dpo_BR = dpo_token_reward(scored.dpo_logratio_BR, scored.mask_BR, beta_dpo, dpo_clip)
    unclipped_BR = dpo_token_reward(scored.dpo_logratio_BR, scored.mask_BR, beta_dpo, None)
    return replace(
        beside(scored, score_B, kl_coef),
        dpo_BR=redistribute(dpo_BR, scored),
        num_clipped=(dpo_BR != unclipped_BR).sum(),
    )


TokenReward = Callable[[ScoredRollouts, Tensor, float], TokenRewards]  # (scored, score [B], kl_coef)
# (DPO rewards [B, R], 0 on padding; the rollouts they belong to) -> where they are paid, [B, R]
Redistribution = Callable[[Tensor, ScoredRollouts], Tensor]


def as_it_is(dpo_BR: Tensor, scored: ScoredRollouts) -> Tensor:
    """RTO: every token is paid its own."""
    return dpo_BR


def all_at_end(dpo_BR: Tensor, scored: ScoredRollouts) -> Tensor:
    """DDPO: the sum on the last token."""
    return at_last_token(dpo_BR.sum(dim=1), scored.mask_BR)


def less_sum_at_end(dpo_BR: Tensor, scored: ScoredRollouts) -> Tensor:
    """RS-PPO: every token is paid its own, and the last one gives the sum back."""
    return dpo_BR - all_at_end(dpo_BR, scored)


def at_sentence_ends(dpo_BR: Tensor, scored: ScoredRollouts, delimiter_ids: frozenset[int]) -> Tensor:
    """Semi-RTO: the sum of a sentence on its last token, a delimiter or the last token of the response."""
    is_end_BR = torch.zeros_like(scored.mask_BR, dtype=torch.bool)
    for row, rollout in enumerate(scored.rollouts):
        ends = [place for place, token in enumerate(rollout.response_ids) if token in delimiter_ids]
        is_end_BR[row, ends] = True
    return sums_at(dpo_BR, is_end_BR, scored.mask_BR)


def sums_at(x_BR: Tensor, is_end_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Sums of the stretches that end where `is_end_BR`, and of the rest on the last token, shape [B, R]."""
    x_BR = keep(x_BR, mask_BR)
    last_BR = at_last_token(x_BR.new_ones(len(x_BR)), mask_BR) != 0
    is_end_BR = (is_end_BR & (mask_BR != 0)) | last_BR
    # Stretch of each token: the ends before it.
    stretch_BR = is_end_BR.long().cumsum(dim=1) - is_end_BR.long()
    sums_BR = torch.zeros_like(x_BR).scatter_add(1, stretch_BR, x_BR)
    return keep(sums_BR.gather(1, stretch_BR), is_end_BR)
