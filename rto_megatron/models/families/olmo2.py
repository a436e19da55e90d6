"""OLMo-2: norms behind attention and feed-forward network instead of before them, and over all heads of q and of k."""

from dataclasses import replace

from rto_megatron.models.families import blocks
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import MappedParameter

_NORMS = blocks.NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


def _layer(shape: ModelShape, index: int) -> tuple[MappedParameter, ...]:
    return *blocks.attention(shape, index, _NORMS), *blocks.dense(shape, index, _NORMS)


def _read(config: HfConfig, shape: ModelShape) -> ModelShape:
    return replace(shape, norms="after", has_whole_qk_norm=True)


FAMILY = Family(
    architectures={False: "Olmo2ForCausalLM", True: "Olmo2ForSequenceClassification"},
    layer=_layer,
    holds=lambda shape: shape.has_whole_qk_norm and shape.norms == "after",
    ropes=frozenset(),
    read=_read,
    config=lambda shape: {"attention_bias": False},
)
