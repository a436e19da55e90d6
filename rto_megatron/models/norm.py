"""RMSNorm for the local layer spec; Megatron's own local norm refuses sequence parallelism."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension.

    The weight is replicated over tensor ranks; with sequence parallelism each rank sees a part of the tokens, so the
    weight carries Megatron's `sequence_parallel` tag, by which its gradient is summed over tensor ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`; statistics in float32 as in Hugging Face's LlamaRMSNorm."""
        x_float = x.float()
        normed = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)
