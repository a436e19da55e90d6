"""Attention with a window or a soft cap, some queries at a time, equals its definition over the whole matrix."""

from pathlib import Path

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from models.split_heads import peak_bytes
from ranks import run_ranks
from torch import Tensor

from rto_megatron.models.head_memory import PART_QUERIES, capped_bytes
from rto_megatron.models.modules import PackedCoreAttention

HEADS, GROUPS, WIDTH = 4, 2, 8
LENGTH = 2 * PART_QUERIES + 70  # three parts, the last one short
CASES = [  # (window, soft cap, queries)
    (3, None, LENGTH),
    (PART_QUERIES + 90, None, LENGTH),  # parts are as long as the window
    (None, 1.5, LENGTH),
    (3, 1.5, LENGTH - 30),  # the first keys are of another context rank
]


def _attention(window: int | None, softcap: float | None) -> PackedCoreAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        kv_channels=WIDTH,
        window_size=None if window is None else (window - 1, 0),
    )
    return PackedCoreAttention(config, 1, softcap=softcap)


def _inputs(num_queries: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, HEADS, num_queries, WIDTH), (1, GROUPS, LENGTH, WIDTH), (1, GROUPS, LENGTH, WIDTH)]
    return [torch.randn(size, generator=generator) for size in sizes]


def _defined(window: int | None, softcap: float | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    first, outs = key.shape[2] - query.shape[2], []
    for at in range(query.shape[2]):
        end = first + at + 1
        seen = slice(0 if window is None else max(0, end - window), end)
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = key[0, group, seen] @ query[0, head, at] / WIDTH**0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            heads.append(scores.softmax(0) @ value[0, group, seen])
        outs.append(torch.stack(heads))
    return torch.stack(outs, 1)[None]


@pytest.mark.parametrize(("window", "softcap", "num_queries"), CASES)
def test_parts_give_the_whole(window: int | None, softcap: float | None, num_queries: int) -> None:
    ours = [x.requires_grad_() for x in _inputs(num_queries)]
    theirs = [x.double().requires_grad_() for x in _inputs(num_queries)]
    got = _attention(window, softcap).attend(*ours)
    want = _defined(window, softcap, *theirs)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (got * weights).sum().backward()
    (want * weights.double()).sum().backward()
    for own, other in zip(ours, theirs, strict=True):
        assert own.grad is not None and other.grad is not None
        torch.testing.assert_close(own.grad.double(), other.grad, atol=1e-5, rtol=1e-5)


def _peak(dtype: torch.dtype, trace: Path) -> int:
    inputs = [x.to(dtype).requires_grad_() for x in _inputs(LENGTH)]
    attention = _attention(None, 1.5)
    return peak_bytes(lambda: attention.attend(*inputs), trace)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_memory_of_scores_with_a_cap_is_what_is_planned_for(dtype: torch.dtype, tmp_path: Path) -> None:
    (peak,) = run_ranks(1, _peak, dtype, tmp_path / "trace.json")
    planned = capped_bytes(LENGTH, LENGTH, HEADS, dtype.itemsize)
    print(f"{peak / 2**20:.1f} MiB, {planned / 2**20:.1f} planned")
    assert 0.7 * planned < peak < 1.1 * planned
