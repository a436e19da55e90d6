"""Qwen2 and Qwen2.5: Llama's layers with a bias on q, k and v; long contexts by yarn."""

from dataclasses import replace

from rto_megatron.models.families import llama
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import ModelShape


def refuse_window(config: HfConfig) -> None:
    """Refuses a sliding window that is in use; Qwen configurations name one that is switched off.

    Raises:
        UserError: some layer would cut off positions.
    """
    values = config.values
    # max_window_layers does not help: which layers it spares depends on the family and the version of transformers.
    if values.get("use_sliding_window") or "sliding_attention" in (values.get("layer_types") or ()):
        config.refuse_short_window(values.get("sliding_window", 4096))


def is_dense(shape: ModelShape) -> bool:
    """`llama.is_dense`, but for contexts that yarn stretches."""
    return llama.is_dense(replace(shape, rotation=replace(shape.rotation, yarn=None)))


def _read(config: HfConfig, shape: ModelShape) -> ModelShape:
    refuse_window(config)
    return replace(shape, has_qkv_bias=True)


FAMILY = Family(
    architectures={False: "Qwen2ForCausalLM", True: "Qwen2ForSequenceClassification"},
    layer=llama.layer,
    holds=lambda shape: is_dense(shape) and shape.has_qkv_bias and not shape.has_qk_norm,
    ropes=frozenset({"llama3", "yarn"}),
    read=_read,
    config=lambda shape: {"use_sliding_window": False},
)
