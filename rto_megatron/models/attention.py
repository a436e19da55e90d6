"""Core attention on torch's scaled_dot_product_attention: packed sequences without TransformerEngine."""

import math

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional


class PackedCoreAttention(MegatronModule):
    """Causal attention of the heads on this tensor rank.

    Padded rows need no mask: padding is on the right, so causality alone keeps it away from real tokens.
    """

    def __init__(
        self, config: TransformerConfig, *_: object, softmax_scale: float | None = None, **__: object
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "the local core attention has no context parallelism"
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Packed: query [t, n, d] -> [t, n * d]. Padded: [s, b, n, d] -> [s, b, n * d]."""
        assert attention_mask is None and attention_bias is None
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))  # [b, n, s, d]
            out = out.permute(2, 0, 1, 3)
            return out.reshape(*out.shape[:2], -1)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        pieces = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        outs = [
            self._attend(*(x.transpose(0, 1)[None] for x in piece))[0].transpose(0, 1) for piece in pieces
        ]
        out = torch.cat(outs)
        return out.reshape(out.shape[0], -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
