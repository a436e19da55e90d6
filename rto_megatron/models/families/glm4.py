"""GLM-4 (0414): norms around attention and feed-forward network, gate and up in one tensor, and half of each head
rotates, in neighbouring pairs."""

from dataclasses import replace

from rto_megatron.models.families import blocks
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import MappedParameter

_NORMS = blocks.NormNames(
    "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
)


def _layer(shape: ModelShape, index: int) -> tuple[MappedParameter, ...]:
    network = map(blocks.joined, blocks.dense(shape, index, _NORMS))
    return *blocks.attention(shape, index, _NORMS), *network


def _read(config: HfConfig, shape: ModelShape) -> ModelShape:
    return replace(
        shape,
        norms="around",
        has_qkv_bias=bool(config.values["attention_bias"]),
        rotation=replace(shape.rotation, is_interleaved=True),
    )


FAMILY = Family(
    architectures={False: "Glm4ForCausalLM", True: "Glm4ForSequenceClassification"},
    layer=_layer,
    holds=lambda shape: shape.norms == "around" and not (shape.has_shifted_norms or shape.has_qk_norm),
    required=("head_dim",),
    defaults={"partial_rotary_factor": 0.5, "attention_bias": True},
    refused=("mlp_bias",),
    ropes=frozenset({"partial"}),
    read=_read,
    config=lambda shape: {
        "attention_bias": shape.has_qkv_bias,
        "partial_rotary_factor": shape.rotation.share,
        "pad_token_id": None,  # transformers' own is of the published vocabulary
    },
)
