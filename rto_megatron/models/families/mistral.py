"""Mistral: Llama's layers; a sliding window that would cut is refused, a head dimension of its own is read."""

from rto_megatron.models.families import llama
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import ModelShape


def _read(config: HfConfig, shape: ModelShape) -> ModelShape:
    # Absent is not null: transformers' default is Mistral-7B-v0.1's window.
    config.refuse_short_window(config.values.get("sliding_window", 4096))
    return shape


FAMILY = Family(
    architectures={False: "MistralForCausalLM", True: "MistralForSequenceClassification"},
    layer=llama.layer,
    holds=llama.FAMILY.holds,
    read=_read,
    config=lambda shape: {"sliding_window": None},
)
