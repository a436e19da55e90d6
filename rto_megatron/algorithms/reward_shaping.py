"""What is done to the numbers of one source of rewards before they are added: normalised first, then clipped.

Legend: B responses, those to one prompt side by side; R response positions.
"""

import torch
from torch import Tensor

from rto_megatron.algorithms.advantages import AllSum
from rto_megatron.algorithms.groups import STD_FLOOR, deviation_of_group, mean_of_group


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
    return tokens_normalized_in_batch(score_B, torch.ones_like(score_B), all_sum)


def tokens_normalized_in_batch(value_BR: Tensor, mask_BR: Tensor, all_sum: AllSum) -> Tensor:
    """(value - mean) / (standard deviation, unbiased, + 1e-4) over the tokens of all replicas, 0 behind responses.

    Args:
        mask_BR: 1 on tokens.
        all_sum: sum over the data-parallel ranks; every rank must call this.
    """
    own, mask = value_BR.double(), mask_BR.double()
    total, count = all_sum(torch.stack([(own * mask).sum(), mask.sum()]))
    mean = total / count
    squares = all_sum(((own - mean).square() * mask).sum())
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    normalized: Tensor = (own - mean) / (std + STD_FLOOR) * mask
    return normalized.to(value_BR.dtype)


def tokens_normalized_in_group(value_BR: Tensor, mask_BR: Tensor, group_size: int) -> Tensor:
    """(value - mean) / (standard deviation, unbiased, + 1e-4) over all tokens of a group, 0 behind responses: [B, R].

    Args:
        mask_BR: 1 on tokens.

    Source: GRPO with process supervision, arXiv 2402.03300, section 4.1.3, where every token is a step.
    """
    groups = zip(value_BR.split(group_size), mask_BR.split(group_size), strict=True)
    return torch.cat([tokens_normalized_in_batch(value, mask, lambda own: own) for value, mask in groups])


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
