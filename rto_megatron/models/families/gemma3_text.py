"""Gemma 3's text model: Gemma 2's layers with norms of heads, windows on five of six layers, which rotate by a base of
their own."""

from dataclasses import replace

from rto_megatron.models.families import gemma2
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import ModelShape


def _read(config: HfConfig, shape: ModelShape) -> ModelShape:
    every = config.values.get("sliding_window_pattern") or 6
    return replace(gemma2.read_layers(config, shape, every), has_qk_norm=True)


FAMILY = Family(
    architectures={False: "Gemma3ForCausalLM", True: "Gemma3TextForSequenceClassification"},
    layer=gemma2.layer,
    holds=lambda shape: shape.has_shifted_norms and shape.norms == "around" and shape.has_qk_norm,
    required=gemma2.REQUIRED,
    defaults={"tie_word_embeddings": True, "sliding_window": 4096, "rope_theta": 1e6},
    refused=("attention_bias", "use_bidirectional_attention"),
    ropes=frozenset({"linear", "by_layer"}),
    activations=gemma2.ACTIVATIONS,
    activation_key="hidden_activation",
    read=_read,
    config=gemma2.config_keys,
)
