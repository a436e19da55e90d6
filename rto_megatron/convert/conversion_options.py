"""What a user may choose about a conversion."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rto_megatron.errors import ConversionError
from rto_megatron.models.weight_map import dtype_name
from rto_megatron.storage.not_finite import num_not_finite

Advance = Callable[[int], None]  # call with the bytes that were done


@dataclass(frozen=True)
class Options:
    """Choices of both directions.

    Attributes:
        dtype: of the weights that are written; null: that of the source, where it is mixed the one without loss.
        max_file_bytes: of one file, unless a single tensor is larger.
        has_scalar_head: convert a reward model or critic, or a language model; null: what the source is.

    Example:
        Options(dtype=torch.bfloat16, max_file_bytes=5 * 10**9, has_scalar_head=None)
    """

    dtype: torch.dtype | None
    max_file_bytes: int
    has_scalar_head: bool | None


def is_narrower(dtype: torch.dtype, source: torch.dtype) -> bool:
    """Whether numbers of `source` are rounded, or overflow, in `dtype`."""
    ours, theirs = torch.finfo(dtype), torch.finfo(source)
    return ours.eps > theirs.eps or ours.max < theirs.max


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in another dtype.

    Raises:
        ConversionError: a number does not fit.
    """
    written = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and num_not_finite(written) > num_not_finite(
        tensor
    ):
        largest = float(tensor[torch.isfinite(tensor)].abs().max())
        raise ConversionError(
            f"{name} holds {largest:g}, which {dtype_name(dtype)} cannot; use --dtype bf16 or fp32"
        )
    return written
