"""All sequences of a row in one call: what the kernel is told gives the loop's numbers.

torch has the kernel for GPUs alone; here its operator gets a CPU implementation by the documented definition.
"""

from itertools import pairwise

import torch
from engine.layouts import topology
from megatron.core.transformer import TransformerConfig
from ranks import run_ranks
from torch import Tensor
from torch.nn.attention import varlen

from rto_megatron.data.packing import token_batch
from rto_megatron.models.context_attention import GatheredKeysAttention
from rto_megatron.models.modules import PackedCoreAttention
from rto_megatron.models.packed_rows import attend_at_once, packed_row, row_of

OFFSETS = (0, 1, 9, 23, 24)
CPU = torch.device("cpu")


def by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float,
    window_size: list[int],
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each sequence for itself; the last query sees the last key, and none what is behind it or before its window."""
    outs, (left, right) = [], window_size
    assert right == 0 and is_causal == (left == -1)
    for (q0, q1), (k0, k1) in zip(*(pairwise(x.tolist()) for x in (cu_seq_q, cu_seq_k)), strict=True):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        q = query[q0:q1].transpose(0, 1)
        k, v = (x[k0:k1].transpose(0, 1).repeat_interleave(len(q) // x.shape[1], 0) for x in (key, value))
        place = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        sees = (place >= 0) & ((place <= left) | torch.tensor(left == -1))
        scores = (q @ k.mT * scale).masked_fill(~sees, -torch.inf)
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs), query.new_zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


varlen._varlen_attn.register_kernel("cpu")(by_definition)


def _config(**changes: object) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=16, **changes
    )


def _inputs() -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(OFFSETS[-1], heads, 16) for heads in (4, 2, 2)]


def test_one_call_is_the_loop_with_a_window_and_without() -> None:
    query, key, value = _inputs()
    row = packed_row(OFFSETS, query.device)
    for changes in ({}, {"window_size": (2, 0)}):
        attention = PackedCoreAttention(_config(**changes), 1)
        want = attention(query, key, value, None, packed_seq_params=row)
        got = attend_at_once(query, key, value, row, row, attention.window, attention.softmax_scale).flatten(
            1
        )
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_sequences_that_share_a_prompt_attend_as_with_prompts_of_their_own() -> None:
    sequences = [([1] * 9, 9), ([*range(12)], 7), ([5, 3], 1), ([*range(7), 2], 7), ([*range(7), 4, 4], 7)]
    batch = token_batch(sequences, True, 5, CPU, shares_prompts=True)
    assert batch.shared is not None and len(batch.shared.tokens_K) == 30 < len(batch.tokens_T) == 40
    torch.manual_seed(3)
    once = [torch.randn(30, heads, 16) for heads in (4, 2, 2)]
    own = [x[batch.shared.read_T] for x in once]
    row, shared = packed_row(batch.cu_seqlens, CPU), row_of(batch.shared)
    for changes, softcap in (({}, None), ({"window_size": (2, 0)}, None), ({"window_size": (9, 0)}, 5.0)):
        attention = PackedCoreAttention(_config(**changes), 1, softcap=softcap)
        want = attention(*own, None, packed_seq_params=row)
        got = attention(*once, None, packed_seq_params=shared)[batch.shared.read_T]
        real = slice(0, batch.last_positions[-1] + 1)
        torch.testing.assert_close(got[real], want[real], atol=1e-6, rtol=1e-6)
        if softcap is None:
            sharing = shared.sharing
            assert sharing is not None
            at_once = attend_at_once(
                once[0],
                sharing.seen(once[1]),
                sharing.seen(once[2]),
                sharing.queries,
                sharing.keys,
                attention.window,
                attention.softmax_scale,
            ).flatten(1)
            torch.testing.assert_close(at_once[batch.shared.read_T][real], want[real], atol=1e-6, rtol=1e-6)


def _gathered() -> None:
    place = topology("cp2_gather")
    query, key, value = _inputs()
    own = slice(place.context_rank * 12, (place.context_rank + 1) * 12)
    mine = [x[own] for x in (query, key, value)]
    for changes in ({}, {"window_size": (2, 0)}):
        attention = GatheredKeysAttention(_config(**changes), 1, pg_collection=place.groups)
        want = attention(*mine, None, packed_seq_params=packed_row(OFFSETS, query.device))
        got = attention.attend_at_once(mine[0], key, value, OFFSETS)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_one_call_over_gathered_keys_is_the_loop() -> None:
    run_ranks(2, _gathered)
