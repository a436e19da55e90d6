"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama's layers with q, k, v and gate, up in one tensor each.

A window is of every layer. Of longrope, texts within the positions of pretraining are computed, which pool and trainer
then do with one set of factors; a longer text would take another set from its first token on.
"""

from dataclasses import replace

from rto_megatron.models.families import blocks, llama
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.rotation_shape import PLAIN_ROTATION
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import MappedParameter


def _layer(shape: ModelShape, index: int) -> tuple[MappedParameter, ...]:
    return tuple(map(blocks.joined, llama.layer(shape, index)))


def _read(config: HfConfig, shape: ModelShape) -> ModelShape:
    window, longrope = config.values.get("sliding_window"), shape.rotation.longrope
    positions = shape.max_positions if longrope is None else longrope.original_positions
    is_cutting = window is not None and window < positions
    return replace(shape, max_positions=positions, window=window if is_cutting else None)


def _config(shape: ModelShape) -> dict[str, object]:
    longrope = shape.rotation.longrope
    # transformers' own padding token may be beyond the vocabulary.
    keys: dict[str, object] = {"sliding_window": shape.window, "pad_token_id": None}
    if longrope is not None:
        keys["max_position_embeddings"] = longrope.positions
        keys["original_max_position_embeddings"] = longrope.original_positions
    return keys


def _holds(shape: ModelShape) -> bool:
    is_plain = (
        shape.experts is None and shape.latent is None and not (shape.has_qkv_bias or shape.has_qk_norm)
    )
    rotation = replace(shape.rotation, share=1.0, longrope=None)
    return is_plain and set(shape.own_parts) <= {"window", "rotation"} and rotation == PLAIN_ROTATION


FAMILY = Family(
    architectures={False: "Phi3ForCausalLM", True: "Phi3ForSequenceClassification"},
    layer=_layer,
    holds=_holds,
    defaults={"original_max_position_embeddings": 4096},
    ropes=frozenset({"partial", "longrope"}),
    read=_read,
    config=_config,
)
