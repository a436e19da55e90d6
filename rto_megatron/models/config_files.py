"""Shapes from config.json, with its traps, and config.json for weights that are exported."""

from pathlib import Path

from rto_megatron.models.families import FAMILIES, REFUSED
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import NAMED_WEIGHTS, HfConfig, read_config
from rto_megatron.models.rope_config import FoundRope, read_rope, rope_keys
from rto_megatron.models.rotation_shape import PLAIN_ROTATION
from rto_megatron.models.shape import ModelShape

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
    family = FAMILIES[model_type]
    config = HfConfig(config.path, {**family.defaults, **config.values})
    config.refuse_set(*family.refused)
    activation = config.values.get(family.activation_key) or next(iter(family.activations))
    if activation not in family.activations:
        config.refuse(
            f"{family.activation_key} is {activation!r}; the gate here is {' or '.join(family.activations)}"
        )
    config.require(*_REQUIRED, *family.required)
    return family.read(config, _common_shape(config, family, activation))


def _common_shape(config: HfConfig, family: Family, activation: str) -> ModelShape:
    values = config.values
    heads = values["num_attention_heads"]
    if family.not_run:  # a family that is converted and never run here keeps its scaling in config.json
        rope = FoundRope(float(config.rope_theta or 10000.0), None, PLAIN_ROTATION, 0)
    else:
        rope = read_rope(config, family.ropes)
    return ModelShape(
        family=values["model_type"],
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        vocab_size=values["vocab_size"],
        max_positions=max(values["max_position_embeddings"], rope.stretched_positions),
        norm_eps=values["rms_norm_eps"],
        rope_theta=rope.theta,
        rope_scaling_factor=rope.llama3_factor,
        is_tied=bool(values.get("tie_word_embeddings", False)),
        init_std=float(values.get("initializer_range", 0.02)),
        activation=family.activations[activation],
        rotation=rope.rotation,
    )


def config_of(shape: ModelShape, has_scalar_head: bool, dtype: str) -> dict[str, object]:
    """A config.json for a model that came without one, with the keys that transformers 4 and 5 both read.

    Args:
        dtype: float32, bfloat16 or float16.
    """
    family = FAMILIES[shape.family]
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
        **rope_keys(shape),
        "tie_word_embeddings": shape.is_tied,
        "initializer_range": shape.init_std,
        family.activation_key: next(
            name for name, kind in family.activations.items() if kind == shape.activation
        ),
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
