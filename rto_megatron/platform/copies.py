"""Copies between host and device that the host does not wait for."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 512  # bytes, as torch's own
_LARGEST_POOL_PIECE = 1 << 30
_SMALLEST_PIECE = 16 << 20  # bytes: what the last piece may waste, and copies of that size are as fast as any


def copied_to(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which lies in host memory, on `device`; the host goes on while a GPU reads it from pinned memory."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def host_pieces(num_bytes: int, is_pinned: bool) -> list[Tensor]:
    """So much host memory, uint8, in pieces one behind the other.

    torch takes the next power of two for whatever is pinned (ATen/core/CachingHostAllocator.h): of one piece up to half
    would be wasted.
    """
    pieces: list[Tensor] = []
    while num_bytes:
        size = num_bytes if num_bytes <= _SMALLEST_PIECE else 1 << (num_bytes.bit_length() - 1)
        pieces.append(torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned))
        num_bytes -= size
    return pieces


class HostPool:
    """Host memory of many tensors that live about as long, cut out of pieces of powers of two; see `host_pieces`.

    Args:
        num_bytes: of all tensors, about.

    Example:
        HostPool(4096, is_pinned=False).take((4, 8), torch.bfloat16)
    """

    def __init__(self, num_bytes: int, is_pinned: bool) -> None:
        self._piece_bytes = min(_LARGEST_POOL_PIECE, 1 << max(num_bytes - 1, 1).bit_length())
        self._is_pinned = is_pinned
        self._rests: list[Tensor] = []  # of pieces

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of no particular numbers."""
        num_bytes = math.prod(shape) * dtype.itemsize
        padded = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        place = next((at for at, rest in enumerate(self._rests) if rest.numel() >= padded), len(self._rests))
        if place == len(self._rests):
            size = max(self._piece_bytes, padded)
            self._rests.append(torch.empty(size, dtype=torch.uint8, pin_memory=self._is_pinned))
        rest = self._rests[place]
        self._rests[place] = rest[padded:]
        return rest[:num_bytes].view(dtype).view(tuple(shape))
