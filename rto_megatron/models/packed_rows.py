"""A row of sequences without padding, as attention reads it, and the kernel that attends to all of them at once.

Legend: t query positions, s key positions, n query heads and k key-value heads on this tensor rank, d numbers a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from rto_megatron.platform.copies import copied_to
from rto_megatron.shared_row import SharedRow


@dataclass(frozen=True)
class Sharing:
    """How sequences lie in a row in which prompts stand once; see `SharedRow`.

    Example:
        key, value = sharing.seen(key), sharing.seen(value)
    """

    places: Tensor  # int64 [t], of each token in its sequence
    queries: "PackedRow"
    keys: "PackedRow"
    runs: tuple[int, ...]
    order: tuple[int, ...]

    def seen(self, row: Tensor) -> Tensor:
        """Keys or values [t, k, d] as the sequences see them, each its prompt's and its own, [s, k, d]."""
        runs = row.split(self.runs)
        return torch.cat([runs[number] for number in self.order])


@dataclass
class PackedRow(PackedSeqParams):  # type: ignore[misc]  # megatron-core has no types
    """What Megatron's layers are told of a packed row, and its offsets as numbers: to read them off a GPU stops it.

    Example:
        key.split(row.lengths)
    """

    offsets: tuple[int, ...] = ()
    sharing: Sharing | None = None  # None: every sequence has its prompt

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [end - start for start, end in pairwise(self.offsets)]


def packed_row(offsets: Sequence[int], device: torch.device) -> PackedRow:
    """The row whose sequences begin at `offsets`, the last of which is its end; copied to the device once."""
    on_device = copied_to(torch.tensor(offsets, dtype=torch.int32), device)
    longest = max(end - start for start, end in pairwise(offsets))
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        offsets=tuple(offsets),
    )


def row_of(shared: SharedRow) -> PackedRow:
    """The row in which prompts stand once.

    Its offsets are those of one sequence: what turns heads is given the angles of each token's place instead.
    """
    device = shared.tokens_K.device
    queries, keys = packed_row(shared.added, device), packed_row(shared.seen, device)
    row = packed_row((0, shared.added[-1]), device)
    row.max_seqlen_q = row.max_seqlen_kv = keys.max_seqlen_q
    row.sharing = Sharing(shared.places_K, queries, keys, shared.runs, shared.order)
    return row


def has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether `attend_at_once` can compute it: FlashAttention is for GPUs, 16 bits, heads of equal width up to 256."""
    width = query.shape[-1]
    is_16_bit = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and is_16_bit and width == value.shape[-1] and width <= 256 and width % 8 == 0


def attend_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: PackedRow,
    keys: PackedRow,
    window: int | None,
    scale: float,
) -> Tensor:
    """Causal attention of each sequence to itself.

    Args:
        query, key, value: [t, n, d], [s, k, d], [s, k, d].
        queries, keys: how sequences lie in them. A sequence's keys may begin before its queries, and end with them.
        window: tokens that a query sees, itself included; None: all before it.

    Returns:
        [t, n, d]. The backward pass adds up in no fixed order unless torch is told to be deterministic.
    """
    out = varlen_attn(
        query,
        key,
        value,
        queries.cu_seqlens_q,
        keys.cu_seqlens_q,
        queries.max_seqlen_q,
        keys.max_seqlen_q,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)  # nothing beside it was asked for
    return out
