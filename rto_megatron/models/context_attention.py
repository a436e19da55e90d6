"""Attention over rows that are cut over context ranks, in two schemes.

Legend: t positions of this context rank, T of the whole row, n query heads and k key-value heads on this tensor rank,
d numbers a head, c context ranks.

    ulysses  tokens are exchanged for heads: every rank attends over whole sequences with n / c of the heads, and
             receives (2 n + 2 k) (c - 1) / c^2 times T d numbers. Any lengths are balanced. c must divide n.
    gather   keys and values of the whole row come to every rank, 2 k (c - 1) / c times T d numbers, and its queries
             see those before them. Any number of heads; the last ranks of a long sequence have the most to do.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from rto_megatron.models.modules import PackedCoreAttention
from rto_megatron.models.packed_rows import PackedRow, attend_at_once, has_kernel, packed_row


class _CutRows(PackedCoreAttention):
    """Knows the ranks over which rows are cut."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *_: object,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        **__: object,
    ) -> None:
        super().__init__(config, layer_number, softmax_scale=softmax_scale, softcap=softcap)
        self.group = pg_collection.cp


class UlyssesAttention(_CutRows):
    """Exchanges tokens for heads, attends as without context ranks, and exchanges back.

    Example:
        output = attention.forward(query, key, value, None, packed_seq_params=packed)
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        """[t, n, d] -> [t, n * d]; the offsets of `packed_seq_params` are those of the whole row."""
        assert packed_seq_params is not None, "rows are cut as packed ones"
        size, (num_tokens, num_heads, width) = self.group.size(), query.shape
        if key.shape[1] % size:  # a head whose queries go to several ranks goes to each of them
            copies = size // math.gcd(size, key.shape[1])
            key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        by_rank = [x.unflatten(1, (size, -1)) for x in (query, key, value)]
        counts = [x.shape[2] for x in by_rank]
        mine = torch.cat(by_rank, 2).transpose(0, 1).contiguous()  # [c, t, (n + 2 k) / c, d]
        query, key, value = all_to_all(self.group, mine).flatten(0, 1).split(counts, dim=1)
        out = super().forward(query, key, value, None, packed_seq_params=packed_seq_params)
        theirs = out.view(size, num_tokens, num_heads // size, width)
        back: Tensor = all_to_all(self.group, theirs.contiguous())  # [c of heads, t, n / c, d]
        return back.transpose(0, 1).reshape(num_tokens, num_heads * width)


class GatheredKeysAttention(_CutRows):
    """Gathers keys and values of the whole row; queries stay where they are.

    Example:
        output = attention.forward(query, key, value, None, packed_seq_params=packed)
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        """See `UlyssesAttention.forward`."""
        assert packed_seq_params is not None, "rows are cut as packed ones"
        # Backward adds up what all ranks' queries say of a key, and gives it to the rank that has it.
        both: Tensor = gather_from_sequence_parallel_region(
            torch.cat((key, value), -1), tensor_parallel_output_grad=True, group=self.group
        )
        key, value = both.split((key.shape[-1], value.shape[-1]), dim=-1)
        if self.softcap is None and has_kernel(query, value):
            return self.attend_at_once(query, key, value, packed_seq_params.offsets)
        first, outs = self.group.rank() * len(query), []
        for from_, to, start in self._pieces(len(query), packed_seq_params.offsets):
            piece = (query[from_ - first : to - first], key[start:to], value[start:to])
            outs.append(self.attend(*(x.transpose(0, 1)[None] for x in piece))[0].transpose(0, 1))
        return torch.cat(outs).flatten(1)

    def attend_at_once(self, query: Tensor, key: Tensor, value: Tensor, offsets: Sequence[int]) -> Tensor:
        """Own queries [t, n, d] to keys and values [T, k, d] of the whole row, in one call of a kernel: [t, n * d]."""
        pieces = self._pieces(len(query), offsets)
        first_query, first_key, last = pieces[0][0], pieces[0][2], pieces[-1][1]
        ends = [to for _, to, _ in pieces]
        queries = packed_row([0, *(to - first_query for to in ends)], query.device)
        keys = packed_row([0, *(to - first_key for to in ends)], query.device)
        key, value = key[first_key:last], value[first_key:last]
        return attend_at_once(query, key, value, queries, keys, self.window, self.softmax_scale).flatten(1)

    def _pieces(self, num_queries: int, offsets: Sequence[int]) -> list[tuple[int, int, int]]:
        """Of the sequences that have queries here: the first, the one behind the last, and the sequence's first key."""
        first = self.group.rank() * num_queries
        return [
            (max(start, first), min(end, first + num_queries), start)
            for start, end in pairwise(offsets)
            if start < first + num_queries and end > first
        ]


def context_attention(config: TransformerConfig) -> type[PackedCoreAttention]:
    """The core attention of a layer whose rows are cut as the configuration says, or of one whose rows are whole."""
    return PackedCoreAttention if config.context_parallel_size == 1 else _SCHEMES[config.cp_comm_type]


# Megatron's name of an exchange -> the attention that does it.
_SCHEMES: dict[str, type[PackedCoreAttention]] = {
    "a2a": UlyssesAttention,
    "all_gather": GatheredKeysAttention,
}
