"""What is done to the numbers of one source of rewards before they are added: normalised first, then clipped.

Legend: B responses, those to one prompt side by side; R response positions.
"""

import torch
from torch import Tensor

from rto_megatron.algorithms.advantages import AllSum
from rto_megatron.algorithms.groups import deviation_of_group, mean_of_group

_STD_FLOOR = 1e-4  # as in a group


def normalized_in_group(score_B: Tensor, group_size: int) -> Tensor:
    """(score - mean of its group) / (standard deviation of its group + 1e-4), shape [B].

    Source: GDPO, arXiv 2601.05242 (every reward in its group, before they are added); TRL, trainer/grpo_trainer.py
    (`normalize_then_sum`).
    """
    return (score_B - mean_of_group(score_B, group_size)) / deviation_of_group(score_B, group_size)


def normalized_in_batch(score_B: Tensor, all_sum: AllSum) -> Tensor:
    """(score - mean) / (standard deviation, unbiased, + 1e-4) over the responses of all replicas, shape [B].

    Args:
        all_sum: sum over the data-parallel ranks; every rank must call this.

    Source: TRL, trainer/grpo_trainer.py (`scale_rewards: batch`) for the estimate of the deviation.
    """
    own_B = score_B.double()
    total, count = all_sum(torch.stack([own_B.sum(), own_B.new_tensor(len(own_B))]))
    mean = total / count
    squares = all_sum((own_B - mean).square().sum())
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    normalized_B: Tensor = (own_B - mean) / (std + _STD_FLOOR)
    return normalized_B.to(score_B.dtype)


def overlong_punishment(num_tokens_B: Tensor, max_tokens: int, buffer_tokens: int) -> Tensor:
    """0 up to L_max - L_cache tokens, then falling to -1 at L_max and beyond, shape [B].

    Args:
        num_tokens_B: tokens of each response, end-of-sequence included.
        max_tokens: L_max, the limit of a response.
        buffer_tokens: L_cache.

    Source: DAPO, arXiv 2503.14476, eq. 13.
    """
    free = max_tokens - buffer_tokens
    return ((free - num_tokens_B) / buffer_tokens).clamp(-1.0, 0.0)
