"""Seed-OSS: Llama's layers with a bias on q, k and v; its dropout, which transformers has in training, is none here."""

from dataclasses import replace

from rto_megatron.models.families import llama, qwen2
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import ModelShape


def _read(config: HfConfig, shape: ModelShape) -> ModelShape:
    return replace(shape, has_qkv_bias=bool(config.values.get("attention_bias", True)))


FAMILY = Family(
    architectures={False: "SeedOssForCausalLM", True: "SeedOssForSequenceClassification"},
    layer=llama.layer,
    holds=qwen2.FAMILY.holds,
    required=("head_dim",),
    refused=("attention_out_bias", "mlp_bias"),
    ropes=frozenset(),
    read=_read,
    config=lambda shape: {
        "attention_bias": shape.has_qkv_bias,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
)
