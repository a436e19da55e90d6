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
from torch.autograd.function import FunctionCtx, once_differentiable

NormBuilder = Callable[..., torch.nn.Module]  # (config, hidden_size, eps)
_MOST_PARTS = 8  # in which a norm is computed: each takes some calls of torch


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension.

    The weight is replicated over tensor ranks; with sequence parallelism each rank sees a part of the tokens, so the
    weight carries Megatron's `sequence_parallel` tag, by which its gradient is summed over tensor ranks.

    Example:
        RMSNorm(config, hidden_size=64, eps=1e-5)(x)
    """

    is_shifted = False  # multiplies by 1 + weight

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron reads it there

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`, dtype of the weight; statistics in float32 as in Hugging Face's LlamaRMSNorm.

        Of a float32 `x` the product is rounded once, of another one both factors are rounded before.
        """
        y: Tensor = _Normed.apply(x, self.weight, self.eps, self.is_shifted)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
        return y


class ShiftedRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight), as in Gemma: rounded after the product, and not before.

    Example:
        ShiftedRMSNorm(config, hidden_size=64, eps=1e-6)(x)
    """

    is_shifted = True


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


class _Context(FunctionCtx):
    """What `forward` leaves for `backward`."""

    saved_tensors: tuple[Tensor, Tensor, Tensor]
    is_shifted: bool


class _Normed(torch.autograd.Function):
    """y = w * x / rms(x), with w + 1 for w where the norm is shifted, some rows at a time.

    What torch derives by itself keeps two float32 copies of `x` for the backward pass and has five more of them there;
    this keeps `x` and a number a row, and its float32 numbers are those of some rows at a time.
    """

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, eps: float, is_shifted: bool) -> Tensor:
        y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        x_Rh, y_Rh = x.reshape(-1, x.shape[-1]), y.view(-1, x.shape[-1])
        scale_R1 = x.new_empty(len(x_Rh), 1, dtype=torch.float32)
        gain = 1 + weight.float() if is_shifted else weight
        for rows in _parts_of(x_Rh):
            part = x_Rh[rows].float()
            scale_R1[rows] = torch.rsqrt(part.square().mean(-1, keepdim=True) + eps)
            normed = part * scale_R1[rows]
            y_Rh[rows] = gain * (normed if is_shifted else normed.to(x.dtype))
        ctx.save_for_backward(x, weight, scale_R1)
        ctx.is_shifted = is_shifted
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        # dx = (g - n mean(g n)) / rms(x), with n = x / rms(x), g = dy w, and the mean over the row.
        x, weight, scale_R1 = ctx.saved_tensors
        x_Rh, grad_Rh = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        grad_x_Rh = torch.empty_like(x_Rh, memory_format=torch.contiguous_format)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        gain = weight.float() + ctx.is_shifted
        for rows in _parts_of(x_Rh):
            normed, outer = x_Rh[rows].float() * scale_R1[rows], grad_Rh[rows].float()
            grad_weight += (outer * normed).sum(0)
            inner = outer * gain
            inner.addcmul_(normed, (inner * normed).mean(-1, keepdim=True), value=-1)
            grad_x_Rh[rows] = inner.mul_(scale_R1[rows])
        return grad_x_Rh.view(x.shape), grad_weight.to(weight.dtype), None, None


def _parts_of(rows_Rh: Tensor) -> list[slice]:
    """Few parts of the rows, of a size at least that a core's cache holds, or that a GPU is busy with."""
    least = 2**22 if rows_Rh.is_cuda else 2**17
    size = max(1, max(least, rows_Rh.numel() // _MOST_PARTS) // rows_Rh.shape[-1])
    return [slice(first, first + size) for first in range(0, len(rows_Rh), size)]
