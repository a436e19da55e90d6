"""On one GPU: attention over packed rows in bf16, one call of a kernel, is the loop's in float32; so are gradients."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from rto_megatron.data.packing import token_batch
from rto_megatron.models.context_attention import GatheredKeysAttention
from rto_megatron.models.modules import PackedCoreAttention
from rto_megatron.models.packed_rows import PackedRow, has_kernel, packed_row, row_of
from rto_megatron.parallel.topology import Topology

pytestmark = pytest.mark.gpu
OFFSETS = (0, 1, 130, 300, 304)
BF16 = 0.02  # of the norm


def _outputs(attention: PackedCoreAttention, inputs: list[Tensor], row: PackedRow) -> list[Tensor]:
    """The output and the gradients of queries, keys and values, in float32."""
    leaves = [one.detach().requires_grad_() for one in inputs]
    out = attention(*leaves, None, packed_seq_params=row)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    (out.float() * weight).sum().backward()
    return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]


def _largest_error(
    kind: type[PackedCoreAttention], window: int | None, row: PackedRow, place: Topology
) -> float:
    """Of output and gradients by the kernel, over the norm of the loop's."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=256,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=64,
        window_size=None if window is None else (window - 1, 0),
    )
    torch.manual_seed(2)
    device = place.device.torch_device
    short = [torch.randn(OFFSETS[-1], heads, 64, device=device).bfloat16() for heads in (4, 2, 2)]
    assert has_kernel(short[0], short[2]) == place.device.is_cuda
    attention = kind(config, 1, pg_collection=place.groups)
    whole = [one.float() for one in short]
    pairs = zip(_outputs(attention, short, row), _outputs(attention, whole, row), strict=True)
    return max(float((got - want).norm() / want.norm()) for got, want in pairs)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kind", [PackedCoreAttention, GatheredKeysAttention])
def test_the_kernel_is_the_loop(kind: type[PackedCoreAttention], window: int | None, place: Topology) -> None:
    assert _largest_error(kind, window, packed_row(OFFSETS, place.device.torch_device), place) < BF16


@pytest.mark.parametrize("window", [None, 7])
def test_the_kernel_is_the_loop_where_sequences_share_a_prompt(window: int | None, place: Topology) -> None:
    prompt, ends = [5] * 130, (20, 100, 40)
    sequences = [(prompt + [6] * num, len(prompt)) for num in ends] + [([7] * 14, 3)]
    shared = token_batch(sequences, True, 1, place.device.torch_device, shares_prompts=True).shared
    assert shared is not None and shared.added[-1] == OFFSETS[-1]
    assert _largest_error(PackedCoreAttention, window, row_of(shared), place) < BF16
