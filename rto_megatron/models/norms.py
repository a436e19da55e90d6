"""Norms of a GPTModel: of a layer's states, of heads, and of all heads at once."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

NormBuilder = Callable[..., torch.nn.Module]  # (config, hidden_size, eps)


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension.

    The weight is replicated over tensor ranks; with sequence parallelism each rank sees a part of the tokens, so the
    weight carries Megatron's `sequence_parallel` tag, by which its gradient is summed over tensor ranks.

    Example:
        RMSNorm(config, hidden_size=64, eps=1e-5)(x)
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron reads it there

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`, dtype of the weight; statistics in float32 as in Hugging Face's LlamaRMSNorm.

        Of a float32 `x` the product is rounded once, of another one both factors are rounded before.
        """
        x_float = x.float()
        normed = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed.to(x.dtype)).to(self.weight.dtype)


class ShiftedRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight), as in Gemma: rounded after the product, and not before.

    Example:
        ShiftedRMSNorm(config, hidden_size=64, eps=1e-6)(x)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`, dtype of the weight."""
        x_float = x.float()
        normed = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return (normed * (1 + self.weight.float())).to(self.weight.dtype)


class AllHeadsRMSNorm(torch.nn.Module):
    """x / rms(x) * weight over all heads of all tensor ranks, each of which has the weights of its own heads.

    Example:
        AllHeadsRMSNorm(config, own_size=32, size=64, group=group)(query)
    """

    def __init__(
        self, config: TransformerConfig, own_size: int, size: int, eps: float, group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self.eps, self.size, self.tp_group = eps, size, group
        self.weight = torch.nn.Parameter(torch.ones(own_size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, heads: Tensor) -> Tensor:
        """[s, b, heads of this rank, d] -> the same; rounded after the product, as in Hugging Face's Olmo2RMSNorm."""
        x = heads.flatten(2).float()
        own = x.square().sum(-1, keepdim=True)
        # Of each rank's output every rank's input has a part of the gradient: added up on the way back, too.
        total = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(own, group=self.tp_group), group=self.tp_group
        )
        normed = x * torch.rsqrt(total / self.size + self.eps)
        return (self.weight * normed).to(heads.dtype).view_as(heads)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, object] | None = None,
    ) -> ShardedStateDict:
        """Called by Megatron: the weight is cut over tensor ranks."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
