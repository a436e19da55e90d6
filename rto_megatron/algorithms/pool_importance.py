"""Importance sampling between the pool, which samples, and the trainer, which learns.

Both hold the same weights, and kernels and dtypes make them two policies; where the pool samples ahead of the trainer
its weights are older as well. Responses are drawn from pi_pool while the loss takes them for draws from pi_old, the
trainer's policy at the step: weighing a token by pi_old / pi_pool corrects its gradient, and the cap bounds what one
unlikely token or response can do.

Source: Yao et al. (2025), "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
fengyao.notion.site/off-policy-rl; verl and OpenRLHF have it as "tis". The modes are TRL 1.16's
(trainer/grpo_trainer.py, vllm_importance_sampling_mode).
"""

from typing import Literal

import torch
from torch import Tensor

from rto_megatron.algorithms.losses import keep
from rto_megatron.types import ScoredRollouts

# The ratio is of a token, or of a whole response; one above the cap is lowered to it, or counts nothing.
ImportanceMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def compared_tokens(scored: ScoredRollouts) -> Tensor:
    """1 on tokens that the pool sampled and the trainer's policy was asked of, shape [B, R]."""
    asked = scored.by_trainer
    return scored.sampled_BR if asked is None else keep(scored.sampled_BR, asked.is_asked_B.unsqueeze(1))


def pool_log_ratio(scored: ScoredRollouts) -> Tensor:
    """log pi_trainer - log pi_pool of each token, nats, shape [B, R]; 0 where they are not compared."""
    trainer_BR = scored.logp_old_BR if scored.by_trainer is None else scored.by_trainer.logp_BR
    return keep(trainer_BR - scored.logp_pool_BR, compared_tokens(scored))


def pool_ratio(scored: ScoredRollouts, mode: ImportanceMode) -> Tensor:
    """pi_old / pi_pool before the cap, shape [B, R]: of each token, or of its response, the product over its tokens."""
    log_ratio_BR = pool_log_ratio(scored)
    if mode in ("sequence_truncate", "sequence_mask"):
        log_ratio_BR = log_ratio_BR.sum(dim=1, keepdim=True).expand_as(log_ratio_BR)
    return log_ratio_BR.exp()


def pool_importance(
    scored: ScoredRollouts, cap: float | None, mode: ImportanceMode = "token_truncate"
) -> Tensor:
    """The weight of each token's policy loss, shape [B, R]: its ratio where that is at most `cap`, else the cap or 0.

    Args:
        cap: at least 1, so that tokens on which both agree keep the weight 1; None: all weights are 1.
        mode: what the ratio is of, and what becomes of one above the cap.
    """
    if cap is None:
        return torch.ones_like(scored.logp_old_BR)
    ratio_BR = pool_ratio(scored, mode)
    if mode in ("token_mask", "sequence_mask"):
        return torch.where(ratio_BR > cap, torch.zeros_like(ratio_BR), ratio_BR)
    return ratio_BR.clamp(max=cap)
