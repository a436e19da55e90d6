"""A 64-bit sum over a buffer that notices changed and exchanged words: against accidents, not attackers."""

from functools import lru_cache

import torch
from torch import Tensor

_WORDS_PER_CHUNK = 1 << 20  # bounds the weights and, on CUDA, the products: 8 MiB each
_GOLDEN = -7046029254386353131  # 2^64 / golden ratio as int64: spreads the weights of neighbouring words


def digest(raw: Tensor) -> int:
    """Returns sum_i w_i x_i mod 2^64 with odd weights w_i over the 8-byte words x_i of a buffer.

    An odd weight is invertible, so any single changed word changes the sum; two exchanged words do unless
    their difference times that of their weights is a multiple of 2^64. Bits are compared, not values.

    Args:
        raw: uint8, contiguous, a multiple of 8 bytes, on CPU or CUDA: both give the same number.
    """
    words = raw.view(torch.int64)
    total = 0
    for number, chunk in enumerate(words.split(_WORDS_PER_CHUNK)):
        weights = _weights(raw.device)[: chunk.numel()]
        # CUDA has no integer dot product; on a CPU it is several times faster than the product and sum.
        part = (chunk * weights).sum() if raw.is_cuda else torch.dot(chunk, weights)
        total += int(part) * (2 * number + 1)
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


@lru_cache(maxsize=2)
def _weights(device: torch.device) -> Tensor:
    return (
        torch.arange(1, _WORDS_PER_CHUNK + 1, dtype=torch.int64, device=device).mul_(_GOLDEN).bitwise_or_(1)
    )
