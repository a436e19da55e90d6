"""Granite: Llama's layers with multipliers of embeddings, attention scores, residual additions and logits."""

from dataclasses import replace

from rto_megatron.models.families import llama
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import ModelShape


def _read(config: HfConfig, shape: ModelShape) -> ModelShape:
    values = config.values
    return replace(
        shape,
        embedding_scale=float(values.get("embedding_multiplier", 1.0)),
        residual_scale=float(values.get("residual_multiplier", 1.0)),
        score_scale=float(values.get("attention_multiplier", 1.0)),
        logit_divisor=float(values.get("logits_scaling", 1.0)),
    )


def _holds(shape: ModelShape) -> bool:
    plain = replace(shape, embedding_scale=1.0, residual_scale=1.0, score_scale=None, logit_divisor=1.0)
    return shape.score_scale is not None and llama.FAMILY.holds(plain)


FAMILY = Family(
    # transformers has no class for a scalar head; vLLM makes one by its name.
    architectures={False: "GraniteForCausalLM", True: "GraniteForSequenceClassification"},
    layer=llama.layer,
    holds=_holds,
    read=_read,
    config=lambda shape: {
        "embedding_multiplier": shape.embedding_scale,
        "residual_multiplier": shape.residual_scale,
        "attention_multiplier": shape.score_scale,
        "logits_scaling": shape.logit_divisor,
        "attention_bias": False,
        "mlp_bias": False,
    },
)
