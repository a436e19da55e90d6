"""What a user may choose about a conversion."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Advance = Callable[[int], None]  # call with the bytes that were done


@dataclass(frozen=True)
class Options:
    """Choices of both directions.

    Attributes:
        dtype: of the weights that are written; null: that of the source, where it is mixed the one without loss.
        max_file_bytes: of one file, unless a single tensor is larger.
        has_scalar_head: convert a reward model or critic, or a language model; null: what the source is.
    """

    dtype: torch.dtype | None
    max_file_bytes: int
    has_scalar_head: bool | None


def write_dtype(is_float32: bool, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which one tensor is written."""
    return torch.float32 if is_float32 else dtype


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json and reports write it."""
    return str(dtype).removeprefix("torch.")
