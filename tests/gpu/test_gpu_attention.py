"""On one GPU: attention over packed rows in bf16, one call of a kernel, is the loop's in float32; so are gradients."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from rto_megatron.models.context_attention import GatheredKeysAttention
from rto_megatron.models.modules import PackedCoreAttention
from rto_megatron.models.packed_rows import has_kernel, packed_row
from rto_megatron.parallel.topology import Topology

pytestmark = pytest.mark.gpu
OFFSETS = (0, 1, 130, 300, 304)
BF16 = 0.02  # of the norm


def _outputs(attention: PackedCoreAttention, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of queries, keys and values, in float32."""
    leaves = [one.detach().requires_grad_() for one in inputs]
    out = attention(*leaves, None, packed_seq_params=packed_row(OFFSETS, leaves[0].device))
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    (out.float() * weight).sum().backward()
    return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kind", [PackedCoreAttention, GatheredKeysAttention])
def test_the_kernel_is_the_loop(kind: type[PackedCoreAttention], window: int | None, place: Topology) -> None:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=256,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=64,
        window_size=None if window is None else (window - 1, 0),
    )
    torch.manual_seed(2)
    whole = [torch.randn(OFFSETS[-1], heads, 64, device=place.device.torch_device) for heads in (4, 2, 2)]
    short = [one.bfloat16() for one in whole]
    assert has_kernel(short[0], short[2]) == place.device.is_cuda
    attention = kind(config, 1, pg_collection=place.groups)
    pairs = zip(_outputs(attention, short), _outputs(attention, [one.float() for one in short]), strict=True)
    assert max(float((got - want).norm() / want.norm()) for got, want in pairs) < BF16
