"""Qwen3: Llama's layers with a norm on each head of q and k; head_dim is not hidden_size / heads."""

from dataclasses import replace

from rto_megatron.models.families import llama, qwen2
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import ModelShape


def _read(config: HfConfig, shape: ModelShape) -> ModelShape:
    qwen2.refuse_window(config)
    return replace(shape, has_qk_norm=True)


FAMILY = Family(
    architectures={False: "Qwen3ForCausalLM", True: "Qwen3ForSequenceClassification"},
    layer=llama.layer,
    holds=lambda shape: qwen2.is_dense(shape) and shape.has_qk_norm and not shape.has_qkv_bias,
    required=("head_dim",),
    ropes=frozenset({"llama3", "yarn"}),
    read=_read,
    config=lambda shape: {"use_sliding_window": False, "attention_bias": False},
)
