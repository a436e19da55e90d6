"""The pieces losses are made of: the clipped value loss, weights, sums per sequence; `policy_losses` has the policy's.

Legend: B responses, R response positions, T token positions of a micro-batch, S its sequences.
Every loss is a weighted sum whose weights hold the denominator of the micro-batches of all ranks: a sum is all the
engine has to take. They add up to 1 but under `constant`. Where a weight or mask is 0 the term and its gradient are
exactly 0, whatever finite numbers the padding holds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from rto_megatron.types import LossOutput, Minibatch, TokenBatch


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where `mask` is not 0, else 0; unlike in a product an overflow in the padding does not spread."""
    return torch.where(mask != 0, x, torch.zeros_like(x))


def count_sequences(mask_BR: Tensor) -> Tensor:
    """This rank's responses with an unmasked token, scalar: its part of the sequence-mean denominator."""
    return (mask_BR != 0).any(dim=1).sum().to(mask_BR.dtype)


def count_tokens(mask_BR: Tensor) -> Tensor:
    """This rank's unmasked tokens, scalar: its part of the token-mean denominator."""
    return mask_BR.sum()


def sequence_mean_weights(mask_BR: Tensor, num_sequences: float) -> Tensor:
    """Weights of the mean over responses of the mean over their tokens.

    Args:
        mask_BR: 1 on the tokens that count, shape [B, R].
        num_sequences: `count_sequences` of one optimizer step, summed over its micro-batches and all ranks.

    Returns:
        Weights, shape [B, R]. Source: OpenRLHF 0.4.4, models/loss.py (masked mean per row, then mean).
    """
    num_tokens_B1 = mask_BR.sum(dim=1, keepdim=True)
    return mask_BR / (num_tokens_B1.clamp(min=1) * max(num_sequences, 1))


def token_mean_weights(mask_BR: Tensor, num_tokens: float) -> Tensor:
    """Weights of the mean over all tokens.

    Args:
        mask_BR: 1 on the tokens that count, shape [B, R].
        num_tokens: `count_tokens` of one optimizer step, summed over its micro-batches and all ranks.

    Returns:
        Weights, shape [B, R].
    """
    return mask_BR / max(num_tokens, 1)


@dataclass(frozen=True)
class Weighting:
    """A rule for `Minibatch.weight_T`: a rank's share of the denominator, and the weights from the whole.

    Example:
        rule = weighting_of("token_mean", 1024); rule.weights(mask_BR, float(all_sum(rule.count(mask_BR))))
    """

    count: Callable[[Tensor], Tensor]
    weights: Callable[[Tensor, float], Tensor]


WeightingName = Literal["sequence_mean", "token_mean", "constant"]


def weighting_of(name: WeightingName, max_response_tokens: int) -> Weighting:
    """The rule of a name.

    Under `constant` a token weighs 1 / (responses x `max_response_tokens`), whatever the length of its response.
    Source: arXiv 2503.20783, appendix A (Dr. GRPO, whose masked mean takes a constant).
    """
    if name == "sequence_mean":
        return Weighting(count_sequences, sequence_mean_weights)
    if name == "token_mean":
        return Weighting(count_tokens, token_mean_weights)
    return Weighting(lambda mask_BR: count_sequences(mask_BR) * max_response_tokens, token_mean_weights)


def sequence_sums(x_T: Tensor, mask_T: Tensor, batch: TokenBatch) -> Tensor:
    """Sum of the unmasked entries of each real sequence, shape [S]; a trailing padding segment is skipped."""
    return _segment_sums(keep(x_T, mask_T), batch)[: len(batch.last_positions)]


def sequence_means(x_T: Tensor, mask_T: Tensor, batch: TokenBatch) -> Tensor:
    """Mean of the unmasked entries of its sequence at every position, shape [T]; 0 where nothing is unmasked."""
    counts = _segment_sums((mask_T != 0).to(x_T.dtype), batch)
    means = _segment_sums(keep(x_T, mask_T), batch) / counts.clamp(min=1)
    lengths = torch.tensor([end - start for start, end in pairwise(batch.cu_seqlens)], device=x_T.device)
    return means.repeat_interleave(lengths, output_size=len(x_T))  # without it a GPU is waited for


def _segment_sums(x_T: Tensor, batch: TokenBatch) -> Tensor:
    """Sums between the offsets, a trailing padding segment included."""
    lengths = [end - start for start, end in pairwise(batch.cu_seqlens)]
    return torch.stack([piece.sum() for piece in torch.split(x_T, lengths)])


def clipped_value_loss(values_T: Tensor, minibatch: Minibatch, value_clip: float | None) -> LossOutput:
    """Half the squared error of the returns, the larger of the plain and the clipped one, as a weighted sum.

    Args:
        values_T: the critic's values of the states before the actions, shape [T].
        minibatch: old values, returns and weights, shape [T] each.
        value_clip: largest move away from the old value that is rewarded; None: the plain squared error.

    Source: OpenRLHF 0.4.4, models/loss.py:ValueLoss, with its factor 0.5.
    """
    weight_T = minibatch.weight_T
    error_T = keep(values_T - minibatch.returns_T, weight_T)
    plain_T = error_T.square()
    clipped_T, is_beyond_T = plain_T, torch.zeros_like(weight_T, dtype=torch.bool)
    if value_clip is not None:
        move_T = values_T - minibatch.values_old_T
        is_beyond_T = move_T.abs() > value_clip
        move_T = move_T.clamp(-value_clip, value_clip)
        clipped_T = keep(minibatch.values_old_T + move_T - minibatch.returns_T, weight_T).square()
    loss = 0.5 * (weight_T * torch.maximum(plain_T, clipped_T)).sum()
    sums = {
        "loss/value_avg": (loss, weight_T.sum()),
        # Within the clip the two errors are one but for rounding, of which either may have more.
        "val/clipfrac_avg": ((is_beyond_T & (clipped_T > plain_T)).sum(), (weight_T > 0).sum()),
    }
    return LossOutput(loss, sums)
