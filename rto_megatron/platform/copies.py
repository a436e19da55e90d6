"""Copies between host and device that the host does not wait for."""

import torch
from torch import Tensor

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
