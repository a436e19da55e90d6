"""A 64-bit sum over a tensor that notices changed and exchanged words: against accidents, not attackers."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

_WORDS_PER_CHUNK = 1 << 20  # bounds the weights and, on CUDA, the products: 8 MiB each
_WORD_BYTES = 8
_GOLDEN = -7046029254386353131  # 2^64 / golden ratio as int64: spreads the weights of neighbouring words


def digest(tensor: Tensor) -> Tensor:
    """Returns sum_i w_i x_i mod 2^64 with odd weights w_i over the 8-byte words x_i of a tensor's elements in order.

    An odd weight is invertible, so any single changed word changes the sum; two exchanged words do unless
    their difference times that of their weights is a multiple of 2^64. Bits are compared, not values.

    Args:
        tensor: any dtype and shape, on CPU or CUDA: both give the same number.

    Returns:
        int64 [], on the tensor's device, so that many digests cost one synchronisation.
    """
    words = _words(tensor)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, chunk in enumerate(words.split(_WORDS_PER_CHUNK)):
        weights = _weights(tensor.device)[: chunk.numel()]
        # CUDA has no integer dot product; on a CPU it is several times faster than the product and sum.
        part = (chunk * weights).sum() if tensor.is_cuda else torch.dot(chunk, weights)
        total += part * (2 * number + 1)
    return total


def _words(tensor: Tensor) -> Tensor:
    """The tensor's bytes as int64, the last word filled up with zeros."""
    raw = tensor.contiguous().flatten().view(torch.uint8)
    excess = raw.numel() % _WORD_BYTES
    if excess:
        raw = pad(raw, (0, _WORD_BYTES - excess))
    elif raw.data_ptr() % _WORD_BYTES:
        raw = raw.clone()  # a view as words needs an aligned start
    return raw.view(torch.int64)


@lru_cache(maxsize=2)
def _weights(device: torch.device) -> Tensor:
    return (
        torch.arange(1, _WORDS_PER_CHUNK + 1, dtype=torch.int64, device=device).mul_(_GOLDEN).bitwise_or_(1)
    )
