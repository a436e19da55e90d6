"""Layers and attention of families that have more than Megatron's own: norms behind, scales, bases by layer."""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from rto_megatron.models.norms import AllHeadsRMSNorm, NormBuilder
from rto_megatron.models.shape import ModelShape

_Output = tuple[Tensor, Tensor | None]  # of attention or network, and a bias that is not added yet
_Add = Callable[[_Output, Tensor, float], Tensor]


class FamilyLayer(TransformerLayer):  # type: ignore[misc]  # megatron-core has no types
    """Megatron's layer, which norms or scales what attention and feed-forward network add to the residual.

    Example:
        FamilyLayer(config, parts, behind=norm, scale=1.0)
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *positional: object,
        behind: NormBuilder | None,
        scale: float,
        **named: object,
    ) -> None:
        super().__init__(config, submodules, *positional, **named)
        norms: list[torch.nn.Module | None] = [None, None]
        if behind is not None:
            make = partial(behind, config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            self.post_self_attn_layernorm, self.post_mlp_layernorm = norms = [make(), make()]
        self.self_attn_bda, self.mlp_bda = (partial(_adder, norm, scale) for norm in norms)


def _adder(norm: torch.nn.Module | None, scale: float, is_training: bool, is_fused: bool) -> _Add:
    """Called by Megatron in the place of its addition with bias and dropout, of which no model here has any."""

    def add(output: _Output, residual: Tensor, dropout: float) -> Tensor:
        added, bias = output
        assert bias is None and not dropout
        if norm is not None:
            added = norm(added)
        return residual + (added if scale == 1 else added * scale)

    return add


class FamilyAttention(SelfAttention):  # type: ignore[misc]  # megatron-core has no types
    """Megatron's attention, with norms over all heads of q and of k, a base of rotation by kind of layer, longrope.

    Example:
        FamilyAttention(config, parts, layer_number=1, shape=shape)
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *positional: object,
        shape: ModelShape,
        **named: object,
    ) -> None:
        super().__init__(config, submodules, layer_number, *positional, **named)
        is_windowed = layer_number - 1 in shape.windowed_layers
        self.rotation = int(is_windowed and shape.rotation.windowed_theta is not None)
        self.has_own_norms = shape.has_whole_qk_norm
        if shape.rotation.longrope is not None:  # what Megatron computes from yarn's settings
            self._yarn_concentration_factor = shape.rotation.longrope.amplitude
        if shape.has_whole_qk_norm:
            self.q_norm, self.k_norm = (
                AllHeadsRMSNorm(
                    config, num * shape.head_dim, of * shape.head_dim, shape.norm_eps, self.tp_group
                )
                for num, of in (
                    (self.num_attention_heads_per_partition, shape.num_heads),
                    (self.num_query_groups_per_partition, shape.num_kv_heads),
                )
            )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *positional: object,
        rotary_pos_emb: Tensor | None = None,
        **named: object,
    ) -> _Output:
        """Megatron's, with this layer's angles out of those of `Rotations`."""
        if rotary_pos_emb is not None:
            rotary_pos_emb = rotary_pos_emb[:, self.rotation : self.rotation + 1]
        output: _Output = super().forward(
            hidden_states, attention_mask, *positional, rotary_pos_emb=rotary_pos_emb, **named
        )
        return output

    def get_query_key_value_tensors(self, *inputs: object, **named: object) -> tuple[Tensor, Tensor, Tensor]:
        """Megatron's, normed where the family norms all heads at once."""
        query, key, value = super().get_query_key_value_tensors(*inputs, **named)
        if self.has_own_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value
