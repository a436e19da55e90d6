"""Numbers that no model can be meant to have."""

from collections.abc import Mapping

import torch
from torch import Tensor

_SHOWN = 5


def num_not_finite(tensor: Tensor) -> int:
    """How many numbers of a floating-point tensor are NaN or infinite."""
    # The sum is ten times faster than asking every number, and finite only where all are.
    if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return 0
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def described(counts: Mapping[str, int]) -> str:
    """Names and counts of such tensors, the first of many."""
    shown = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:_SHOWN])
    more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    return f"NaN or infinite numbers in {len(counts)} tensors: {shown}{more}"
