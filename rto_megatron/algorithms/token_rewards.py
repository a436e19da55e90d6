"""The reward of every response token, from what the models said about it.

Legend: B responses, R response positions, right-padded. `mask_BR` is 1 on actions. Log-probs are in nats.
Left out of the paper: its ablations (Semi-RTO, DDPO, RS-PPO). beta_3 of eq. 4.7 is 1, as in the paper.
"""

from dataclasses import replace

import torch
from torch import Tensor

from rto_megatron.algorithms.losses import keep
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
    """exp(-k1) - 1 + k1: never negative, of lower variance than k1; for the logs only, nats, shape [B, R]."""
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


def response_score(scored: ScoredRollouts, score_clip: float | None, truncated_penalty: float) -> Tensor:
    """What the whole response is paid, shape [B]: the clamped score, less the penalty if it was cut.

    The penalty comes after the clamp: a response at the lower bound must still feel it.

    Args:
        scored: `score_B` is the reward model's score, already normalised.
        score_clip: bound of the absolute value of the score; None: no bound.
        truncated_penalty: subtracted from the score of responses cut by the length limit; 0: nothing.

    Source: OpenRLHF 0.4.4, models/utils.py:compute_reward (clamp to +-10). The penalty is this project's own.
    """
    score_B = scored.score_B if score_clip is None else scored.score_B.clamp(-score_clip, score_clip)
    return torch.where(truncated_rows(scored), score_B - truncated_penalty, score_B)


def ppo_rewards(scored: ScoredRollouts, score_B: Tensor, kl_coef: float) -> TokenRewards:
    """PPO's reward: the response's score on its last token, the KL penalty on every token (eq. 2.3)."""
    return TokenRewards(
        score_BR=at_last_token(score_B, scored.mask_BR),
        dpo_BR=torch.zeros_like(scored.dpo_logratio_BR),
        kl_BR=kl_penalty(scored.logp_old_BR, scored.logp_ref_BR, scored.mask_BR, kl_coef),
    )


def rto_rewards(
    scored: ScoredRollouts, score_B: Tensor, kl_coef: float, beta_dpo: float, dpo_clip: float | None
) -> TokenRewards:
    """RTO's reward: PPO's and the DPO term on every token, end-of-sequence included (eq. 4.7)."""
    dpo_BR = dpo_token_reward(scored.dpo_logratio_BR, scored.mask_BR, beta_dpo, dpo_clip)
    return replace(ppo_rewards(scored, score_B, kl_coef), dpo_BR=dpo_BR)
