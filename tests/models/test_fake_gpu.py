"""Branches for GPUs on tensors that claim to lie on one: shapes, types, devices, and that nothing waits for the device.

A fake tensor has no data, so to read a number off one is an error, as it would be a stop of a GPU's queue.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.layouts import topology
from fake_gpu import GPU, pretend
from megatron.core.transformer import TransformerConfig
from ranks import run_ranks
from tiny_families import write_family
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rto_megatron.data.packing import token_batch
from rto_megatron.models.build import build_model, forward, transformer_config
from rto_megatron.models.config_files import read_shape
from rto_megatron.models.context_attention import GatheredKeysAttention
from rto_megatron.models.modules import PackedCoreAttention
from rto_megatron.models.packed_rows import has_kernel, packed_row
from rto_megatron.platform.device import Device

SEQUENCES = [(tuple(range(3, 40)), 1), (tuple(range(9, 30)), 1)]
OF_ONE_PROMPT = [(tuple(range(3, 40)), 20), ((*range(3, 23), 7, 8), 20)]


class Kernels(TorchDispatchMode):
    """The attention kernels that were called, with what they were told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[list[object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "varlen_attn" in str(func):
            self.told.append([one for one in args if not isinstance(one, torch.Tensor)])
        assert "scaled_dot_product" not in str(func)
        return func(*args, **(kwargs or {}))


def _on_fake_gpu(check: Callable[..., None], *inputs: object) -> None:
    """In a process of its own: once a tensor claimed to be on a GPU autograd has threads, and no fork survives them."""

    def rank() -> None:
        pretend()
        with FakeTensorMode(), Kernels() as kernels:
            check(kernels, *inputs)

    run_ranks(1, rank)


def _config(**changes: object) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2, hidden_size=128, num_attention_heads=8, num_query_groups=2, kv_channels=16, **changes
    )


def _inputs(num_queries: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.empty(num_queries, heads, 16, dtype=dtype, device=GPU) for heads in (8, 2, 2)]


def _one_call(gpu: Kernels, changes: dict[str, object], window: list[int]) -> None:
    attention = PackedCoreAttention(_config(**changes), 1)
    out = attention(*_inputs(100), None, packed_seq_params=packed_row((0, 60, 100), GPU))
    assert (out.shape, out.device, out.dtype) == ((100, 128), GPU, torch.bfloat16)
    ((longest_query, longest_key, is_causal, scale, told_window, is_grouped, *_),) = gpu.told
    assert (longest_query, longest_key, scale, told_window, is_grouped) == (60, 60, 0.25, window, True)
    assert is_causal == (window == [-1, 0])


@pytest.mark.parametrize(("changes", "window"), [({}, [-1, 0]), ({"window_size": (6, 0)}, [6, 0])])
def test_a_packed_row_is_one_call(changes: dict[str, object], window: list[int]) -> None:
    _on_fake_gpu(_one_call, changes, window)


def _gathered(gpu: Kernels) -> None:
    query, key, value = _inputs(100)
    attention = GatheredKeysAttention(_config(), 1, pg_collection=SecondOfTwo())
    out = attention.attend_at_once(query[:50], key, value, (0, 60, 100))
    assert (out.shape, out.device) == ((50, 128), GPU)
    ((longest_query, longest_key, *_),) = gpu.told
    assert (longest_query, longest_key) == (
        40,
        60,
    )  # of the first sequence 10 queries are here, and all its keys


def test_gathered_keys_are_one_call_that_waits_for_nothing() -> None:
    _on_fake_gpu(_gathered)


class SecondOfTwo:
    """The groups of a rank that has the second half of a row."""

    cp = property(lambda self: self)

    def rank(self) -> int:
        return 1


def _no_kernel(gpu: Kernels) -> None:
    query, _, value = _inputs(100, torch.float32)
    assert not has_kernel(query, value)
    wide = torch.empty(4, 1, 264, dtype=torch.bfloat16, device=GPU)
    assert not has_kernel(wide, wide)


def test_in_float32_there_is_no_such_kernel() -> None:
    _on_fake_gpu(_no_kernel)


def _forward(
    folder: Path, dtype: torch.dtype, sequences: list[tuple[tuple[int, ...], int]]
) -> tuple[int, torch.Size]:
    place = replace(topology("one"), device=Device(GPU, "nccl"))
    shape = read_shape(folder)
    pretend()
    with FakeTensorMode(), torch.no_grad(), GPU, Kernels() as kernels:
        model = build_model(shape, transformer_config(shape, place, dtype, recompute=False), place, False)
        states = forward(model, token_batch(sequences, True, 1, GPU, shares_prompts=True), place)
    assert states.device == GPU and states.dtype == dtype
    return len(kernels.told), states.shape


@pytest.mark.parametrize(
    ("name", "sequences", "num_positions"),
    [("llama", SEQUENCES, 58), ("qwen3", SEQUENCES, 58), ("llama", OF_ONE_PROMPT, 39)],
)
def test_a_forward_waits_for_nothing_and_attends_once_a_layer(
    name: str, sequences: list[tuple[tuple[int, ...], int]], num_positions: int, tmp_path: Path
) -> None:
    write_family(tmp_path, name)
    found = run_ranks(1, _forward, tmp_path, torch.bfloat16, sequences)
    assert found == [(4, torch.Size([num_positions, 1, 64]))]
