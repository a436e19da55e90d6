"""Truncated importance sampling between the pool, which samples, and the trainer, which learns.

Both hold the same weights, and kernels and dtypes make them two policies. Responses are drawn from pi_pool while the
loss takes them for draws from pi_old, the trainer's policy at rollout time: weighing each token by pi_old / pi_pool
corrects its gradient, and the cap bounds what one unlikely token can do.

Source: Yao et al. (2025), "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
fengyao.notion.site/off-policy-rl; verl and OpenRLHF have it as "tis".
"""

import torch
from torch import Tensor

from rto_megatron.algorithms.losses import keep
from rto_megatron.types import ScoredRollouts


def pool_log_ratio(scored: ScoredRollouts) -> Tensor:
    """log pi_old - log pi_pool of each token, nats, shape [B, R]; 0 where the pool sampled nothing."""
    return keep(scored.logp_old_BR - scored.logp_pool_BR, scored.sampled_BR)


def pool_importance(scored: ScoredRollouts, cap: float | None) -> Tensor:
    """min(pi_old / pi_pool, cap) of each token, shape [B, R].

    Args:
        cap: at least 1, so that tokens on which both agree keep the weight 1; None: all weights are 1.
    """
    if cap is None:
        return torch.ones_like(scored.logp_old_BR)
    return pool_log_ratio(scored).exp().clamp(max=cap)
