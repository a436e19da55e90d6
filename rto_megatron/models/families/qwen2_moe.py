"""Qwen2-MoE: Qwen2's attention, experts, and a gated expert that every token passes."""

from dataclasses import replace

from rto_megatron.models.families import blocks, qwen2, qwen3_moe
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import MappedParameter


def _layer(shape: ModelShape, index: int) -> tuple[MappedParameter, ...]:
    assert shape.experts is not None
    if index not in shape.experts.layers:
        return *blocks.attention(shape, index), *blocks.dense(shape, index)
    mixture = blocks.mixture(shape, index, "mlp", qwen3_moe.EXPERT_NAMES)
    return *blocks.attention(shape, index), *mixture, *blocks.shared_expert(shape, index, "mlp.shared_expert")


def _read(config: HfConfig, shape: ModelShape) -> ModelShape:
    qwen2.refuse_window(config)
    if config.values.get("qkv_bias") is False:
        config.refuse("qkv_bias is false; expected Qwen2-MoE's bias on q, k and v")
    experts = replace(
        qwen3_moe.read_experts(config, shape),
        shared_ffn_hidden_size=config.values["shared_expert_intermediate_size"],
        has_shared_gate=True,
    )
    return replace(shape, has_qkv_bias=True, experts=experts)


def _config(shape: ModelShape) -> dict[str, object]:
    assert shape.experts is not None
    shared = {"shared_expert_intermediate_size": shape.experts.shared_ffn_hidden_size, "qkv_bias": True}
    return {**qwen3_moe.experts_config(shape), **shared}


def _holds(shape: ModelShape) -> bool:
    is_shared = shape.experts is not None and shape.experts.has_shared_gate
    return is_shared and shape.latent is None and shape.has_qkv_bias and not shape.has_qk_norm


FAMILY = Family(
    architectures={False: "Qwen2MoeForCausalLM", True: "Qwen2MoeForSequenceClassification"},
    layer=_layer,
    holds=_holds,
    required=(*qwen3_moe.REQUIRED, "shared_expert_intermediate_size"),
    read=_read,
    config=_config,
)
