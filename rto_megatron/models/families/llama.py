"""Llama 2, 3, 3.1 and 3.2: LlamaForCausalLM and LlamaForSequenceClassification."""

from rto_megatron.models.families import blocks
from rto_megatron.models.family import Family
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import MappedParameter


def layer(shape: ModelShape, index: int) -> tuple[MappedParameter, ...]:
    """Attention and a gated feed-forward network, each after its norm."""
    return *blocks.attention(shape, index), *blocks.dense(shape, index)


def is_dense(shape: ModelShape) -> bool:
    """Attention and norms as Llama has them, but for a bias or norms of heads, and no layer with experts."""
    return shape.experts is None and shape.latent is None and not shape.own_parts


FAMILY = Family(
    architectures={False: "LlamaForCausalLM", True: "LlamaForSequenceClassification"},
    layer=layer,
    holds=lambda shape: is_dense(shape) and not (shape.has_qkv_bias or shape.has_qk_norm),
    config=lambda shape: {"attention_bias": False, "mlp_bias": False},
)
