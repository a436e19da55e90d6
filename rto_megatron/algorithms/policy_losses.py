"""The losses of policies, as weighted sums: surrogates that bound the ratio to the sampling policy, and one without.

Legend: T token positions of a micro-batch. All take the log-probs of the actions under the policy being trained, nats,
and a `Minibatch` with old log-probs, advantages, weights, and the importance of the pool's tokens, shape [T] each. The
importance multiplies a token's term; it is exact where it is 1. Metrics have TRL's names, means over action tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rto_megatron.algorithms.losses import keep, sequence_means
from rto_megatron.algorithms.token_rewards import kl_k3
from rto_megatron.types import LossOutput, Minibatch

Loss = Callable[[Tensor, Minibatch], LossOutput]  # (log-probs [T], micro-batch)


def clipped_policy_loss(
    logp_T: Tensor,
    minibatch: Minibatch,
    clip_eps: float,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
) -> LossOutput:
    """PPO's clipped surrogate: weighted sum of -w min(ratio A, clip(ratio, 1 - eps, 1 + eps_high) A).

    Args:
        clip_eps: epsilon of the clip.
        clip_eps_high: epsilon of its upper bound; None: `clip_eps`.
        dual_clip: c, which bounds the surrogate of A < 0 from below by c A; None: no bound.

    Source: OpenRLHF 0.4.4, models/loss.py:PolicyLoss; arXiv 2503.14476, section 3.1 (two epsilons); arXiv 1912.09729,
    eq. 7 (dual clip).
    """
    log_ratio_T = keep(logp_T - minibatch.logp_old_T, minibatch.weight_T)
    return _clipped(log_ratio_T.exp(), log_ratio_T, minibatch, clip_eps, clip_eps_high, dual_clip)


def sequence_clipped_loss(
    logp_T: Tensor,
    minibatch: Minibatch,
    clip_eps: float,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
) -> LossOutput:
    """The clipped surrogate of a response's ratio, exp(mean over its tokens of log pi - log pi_old).

    Every token has its response's ratio, and passes its own share of the gradient: with one advantage per response this
    is GSPO, with one per token GSPO-token.

    Source: arXiv 2507.18071, eq. 7 and 13 to 17.
    """
    log_ratio_T = keep(logp_T - minibatch.logp_old_T, minibatch.weight_T)
    mean_T = sequence_means(log_ratio_T, minibatch.weight_T, minibatch.batch).detach()
    ratio_T = mean_T.exp() * (log_ratio_T - log_ratio_T.detach()).exp()  # the second factor is 1
    return _clipped(ratio_T, log_ratio_T, minibatch, clip_eps, clip_eps_high, dual_clip)


def _clipped(
    ratio_T: Tensor,
    log_ratio_T: Tensor,
    minibatch: Minibatch,
    clip_eps: float,
    clip_eps_high: float | None,
    dual_clip: float | None,
) -> LossOutput:
    advantages_T = minibatch.advantages_T
    plain_T = -ratio_T * advantages_T
    high = clip_eps if clip_eps_high is None else clip_eps_high
    clipped_T = -ratio_T.clamp(1 - clip_eps, 1 + high) * advantages_T
    terms_T = torch.maximum(plain_T, clipped_T)
    fractions = {"policy/clipfrac_avg": clipped_T > plain_T}
    if dual_clip is not None:
        is_bound_T = (advantages_T < 0) & (terms_T > -dual_clip * advantages_T)
        terms_T = torch.where(is_bound_T, -dual_clip * advantages_T, terms_T)
        fractions["policy/dual_clipfrac_avg"] = is_bound_T
    return _weighted(terms_T, ratio_T, log_ratio_T, minibatch, fractions)


def cispo_loss(
    logp_T: Tensor, minibatch: Minibatch, clip_eps: float | None, clip_eps_high: float
) -> LossOutput:
    """Weighted sum of -w clip(ratio) A log pi, no gradient through the ratio: every token keeps some gradient.

    Args:
        clip_eps: the ratio is at least 1 - it; None: no lower bound.
        clip_eps_high: the ratio is at most 1 + it.

    Source: arXiv 2506.13585, eq. 4 and 5 (without its optional mask).
    """
    weight_T = minibatch.weight_T
    log_ratio_T = keep(logp_T - minibatch.logp_old_T, weight_T)
    ratio_T = log_ratio_T.detach().exp()
    bounded_T = ratio_T.clamp(None if clip_eps is None else 1 - clip_eps, 1 + clip_eps_high)
    terms_T = -bounded_T * minibatch.advantages_T * keep(logp_T, weight_T)
    return _weighted(terms_T, ratio_T, log_ratio_T, minibatch, {"policy/clipfrac_avg": bounded_T != ratio_T})


def reinforce_loss(logp_T: Tensor, minibatch: Minibatch) -> LossOutput:
    """Weighted sum of -w A log pi, whose gradient is REINFORCE's; its value means nothing by itself."""
    weight_T = minibatch.weight_T
    log_ratio_T = keep(logp_T - minibatch.logp_old_T, weight_T)
    terms_T = -minibatch.advantages_T * keep(logp_T, weight_T)
    return _weighted(terms_T, log_ratio_T.exp(), log_ratio_T, minibatch, {})


def _weighted(
    terms_T: Tensor,
    ratio_T: Tensor,
    log_ratio_T: Tensor,
    minibatch: Minibatch,
    fractions: dict[str, Tensor],
) -> LossOutput:
    """The weighted sum of the tokens' terms; `fractions` are true on tokens that are counted."""
    weight_T = minibatch.weight_T
    active_T = weight_T > 0
    loss = (weight_T * minibatch.pool_importance_T * terms_T).sum()
    num_tokens = active_T.sum()
    sums = {
        "loss/policy_avg": (loss, weight_T.sum()),
        "policy/approxkl_avg": (0.5 * log_ratio_T.square().sum(), num_tokens),
        **{name: ((is_true_T & active_T).sum(), num_tokens) for name, is_true_T in fractions.items()},
        "val/ratio": ((ratio_T * active_T).sum(), num_tokens),
    }
    return LossOutput(loss, sums)


def with_kl(loss: Loss, beta_kl: float) -> Loss:
    """A policy's loss plus beta_kl times k3 to the reference, weighted alike; a weight of 0 is exactly off.

    Source: arXiv 2402.03300, eq. 3 and 4.
    """

    def with_term(logp_T: Tensor, minibatch: Minibatch) -> LossOutput:
        plain, weight_T = loss(logp_T, minibatch), minibatch.weight_T
        kl = (weight_T * kl_k3(logp_T, minibatch.logp_ref_T, weight_T)).sum()
        sums = {**plain.sums, "loss/kl_avg": (kl, weight_T.sum())}
        return LossOutput(plain.loss + beta_kl * kl if beta_kl else plain.loss, sums)

    return with_term


def with_entropy(loss: Loss, entropy_coef: float) -> Loss:
    """A policy's loss less entropy_coef times the entropy of the policy at every position, weighted alike.

    The result reads [2, T]: log-probs, and entropies of the distributions that they are of, nats.
    Source: arXiv 1707.06347, eq. 9 (its S).
    """

    def with_bonus(outputs_2T: Tensor, minibatch: Minibatch) -> LossOutput:
        logp_T, entropy_T = outputs_2T
        plain, weight_T = loss(logp_T, minibatch), minibatch.weight_T
        entropy_T = keep(entropy_T, weight_T)
        mean = (entropy_T.sum(), (weight_T > 0).sum())
        sums = {**plain.sums, "policy/entropy_avg": mean}
        return LossOutput(plain.loss - entropy_coef * (weight_T * entropy_T).sum(), sums)

    return with_bonus
