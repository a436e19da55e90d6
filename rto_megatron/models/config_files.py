"""Shapes from config.json, with its traps, and config.json for weights that are exported."""

from pathlib import Path
from typing import Any

from rto_megatron.models.families import FAMILIES, REFUSED
from rto_megatron.models.hf_config import NAMED_WEIGHTS, HfConfig, read_config
from rto_megatron.models.shape import ModelShape

# What megatron-core's RotaryEmbedding hard-codes for Llama-3.1 scaling.
MEGATRON_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
# auto_map names Python files of the source, which are neither copied nor run; exported weights have their own names.
_NOT_EXPORTED = ("torch_dtype", "quantization_config", "auto_map", NAMED_WEIGHTS)


def read_shape(folder: Path) -> ModelShape:
    """Reads `folder`/config.json.

    Raises:
        UserError: no config.json, an unsupported model type, or a feature that the Megatron model cannot express.
    """
    return shape_of(read_config(folder))


def shape_of(config: HfConfig) -> ModelShape:
    """The shape that a parsed config.json describes.

    Raises:
        UserError: as `read_shape`.
    """
    found = config.values.get("model_type")
    model_type = str(found)
    if model_type in REFUSED:
        config.refuse(f"model_type is {found!r}: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        config.refuse(f"model_type is {found!r}; supported are {sorted(FAMILIES)}")
    config.refuse_set("attention_bias", "mlp_bias")
    family = FAMILIES[model_type]
    if config.values.get("hidden_act", "silu") not in family.activations:
        config.refuse(
            f"hidden_act is {config.values['hidden_act']!r}; the gate here is {' or '.join(family.activations)}"
        )
    config.require(*_REQUIRED, *family.required)
    return family.read(config, _common_shape(config))


def _common_shape(config: HfConfig) -> ModelShape:
    values = config.values
    heads = values["num_attention_heads"]
    return ModelShape(
        family=values["model_type"],
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        vocab_size=values["vocab_size"],
        max_positions=values["max_position_embeddings"],
        norm_eps=values["rms_norm_eps"],
        rope_theta=float(config.rope_theta or 10000.0),
        rope_scaling_factor=_rope_scaling(config),
        is_tied=bool(values.get("tie_word_embeddings", False)),
        init_std=float(values.get("initializer_range", 0.02)),
        activation=FAMILIES[values["model_type"]].activations[values.get("hidden_act", "silu")],
    )


def _rope_scaling(config: HfConfig) -> float | None:
    rope: dict[str, Any] = config.rope
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if any(isinstance(value, dict) for value in rope.values()):
        kind = "one for each kind of layer"
    share = rope.get("partial_rotary_factor", config.values.get("partial_rotary_factor"))
    if share not in (None, 1):
        config.refuse(f"partial_rotary_factor={share}; positions rotate whole heads here")
    # A family that is converted and never run here keeps its scaling in config.json.
    if kind == "default" or FAMILIES[config.values["model_type"]].not_run:
        return None
    found = {key: rope.get(key) for key in MEGATRON_ROPE}
    if kind != "llama3" or found != MEGATRON_ROPE:
        config.refuse(
            f"rope scaling {rope} cannot be expressed in megatron-core, which knows type llama3 with {MEGATRON_ROPE}"
        )
    return float(rope["factor"])


def config_of(shape: ModelShape, has_scalar_head: bool, dtype: str) -> dict[str, object]:
    """A config.json for a model that came without one, with the keys that transformers 4 and 5 both read.

    Args:
        dtype: float32, bfloat16 or float16.
    """
    family = FAMILIES[shape.family]
    scaling = None
    if shape.rope_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": shape.rope_scaling_factor, **MEGATRON_ROPE}
    common = {
        "model_type": shape.family,
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": shape.is_tied,
        "initializer_range": shape.init_std,
        "hidden_act": next(name for name, kind in family.activations.items() if kind == shape.activation),
    }
    return as_exported({**common, **family.config(shape)}, shape.family, has_scalar_head, dtype)


def as_exported(
    config: dict[str, object], family: str, has_scalar_head: bool, dtype: str
) -> dict[str, object]:
    """A config.json that describes exported weights: architecture, dtype, and the one label of a scalar head."""
    exported = {k: v for k, v in config.items() if k not in _NOT_EXPORTED}
    exported["architectures"] = [architecture(family, has_scalar_head)]
    exported["dtype"] = dtype
    if has_scalar_head:
        exported.update(num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
        if "value_head_prefix" in exported:  # where OpenRLHF looks for the head
            exported["value_head_prefix"] = "score"
    return exported


def architecture(family: str, has_scalar_head: bool) -> str:
    """The class of transformers that loads such a model."""
    return FAMILIES[family].architectures[has_scalar_head]
