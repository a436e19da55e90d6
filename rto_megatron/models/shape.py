"""The sizes of a model, read from a Hugging Face config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rto_megatron.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """Everything that decides parameter shapes and the forward pass."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling_factor: float | None  # Llama-3.1 scaling; null: none
    is_tied: bool  # the output projection is the embedding
    init_std: float
    num_experts: int | None = None  # of each layer; null: dense
    experts_per_token: int | None = None


# What megatron-core's RotaryEmbedding hard-codes for Llama-3.1 scaling.
_MEGATRON_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_FAMILY_OF_MODEL_TYPE = {"llama": "llama", "mixtral": "mixtral"}
_EXPERTS = ("num_local_experts", "num_experts_per_tok")


def _rope_scaling(rope: dict[str, object], path: Path) -> float | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    found = {key: rope.get(key) for key in _MEGATRON_ROPE}
    if kind != "llama3" or found != _MEGATRON_ROPE:
        raise UserError(
            f"{path}: rope scaling {rope} cannot be expressed in megatron-core, "
            f"which knows type llama3 with {_MEGATRON_ROPE}"
        )
    return float(str(rope["factor"]))


_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def _config(path: Path) -> dict[str, object]:
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch or write it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a JSON {type(config).__name__}, expected an object")
    return config


def read_shape(folder: Path) -> ModelShape:
    """Reads `folder`/config.json.

    Raises:
        UserError: no config.json, an unsupported model type, or a feature that the Megatron model cannot express.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no config.json; expected a Hugging Face model folder or a checkpoint of an earlier stage"
        )
    config = _config(path)
    family = _FAMILY_OF_MODEL_TYPE.get(config.get("model_type"))
    if family is None:
        raise UserError(
            f"{path}: model_type is {config.get('model_type')!r}; supported are {sorted(_FAMILY_OF_MODEL_TYPE)}"
        )
    unsupported = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if unsupported or config.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"{path}: {unsupported or ['hidden_act']} is set; the {family} family here has no biases and a silu gate"
        )
    required = (*_REQUIRED, *_EXPERTS) if family == "mixtral" else _REQUIRED
    missing = [key for key in required if config.get(key) is None]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}; expected the config.json of a {family} model")
    if family == "mixtral" and config["num_experts_per_tok"] < 2:
        raise UserError(
            f"{path}: num_experts_per_tok={config['num_experts_per_tok']}; softmax over one chosen expert is always 1, "
            "so Megatron's router cannot express it; expected 2 or more"
        )
    window = config.get("sliding_window")
    if window is not None and window < config["max_position_embeddings"]:
        raise UserError(
            f"{path}: sliding_window={window} is below max_position_embeddings="
            f"{config['max_position_embeddings']}; attention here sees every earlier token"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads = config["num_attention_heads"]
    return ModelShape(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_scaling_factor=_rope_scaling(rope, path),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        init_std=float(config.get("initializer_range", 0.02)),
        num_experts=config["num_local_experts"] if family == "mixtral" else None,
        experts_per_token=config["num_experts_per_tok"] if family == "mixtral" else None,
    )


def check_layout(shape: ModelShape, tensor: int, pipeline: int, where: str) -> list[str]:
    """Why this model cannot be cut in `tensor` x `pipeline` pieces, one sentence each; empty when it can."""
    problems = []
    for count, name in (
        (shape.num_heads, "num_attention_heads"),
        (shape.num_kv_heads, "num_key_value_heads"),
        (shape.ffn_hidden_size, "intermediate_size"),
    ):
        if count % tensor:
            allowed = [t for t in (1, 2, 4, 8, 16, 32) if count % t == 0]
            problems.append(
                f"{where}: parallel.tensor={tensor} does not divide {name}={count}; it can be one of {allowed}"
            )
    if shape.num_layers % pipeline:
        allowed = [p for p in range(1, shape.num_layers + 1) if shape.num_layers % p == 0]
        problems.append(
            f"{where}: parallel.pipeline={pipeline} does not divide num_hidden_layers={shape.num_layers}; "
            f"it can be one of {allowed}"
        )
    return problems


def check_experts(
    trained: Mapping[str, ModelShape], tensor: int, sequence: bool, moe_aux_loss_coef: float
) -> list[str]:
    """Why mixtures of experts cannot be trained as configured, one sentence each.

    Args:
        trained: configuration key -> shape of the models that have an optimizer.
    """
    mixtures = [where for where, shape in trained.items() if shape.num_experts is not None]
    problems = [
        f"{where} has experts, which Megatron trains over parallel.tensor={tensor} ranks only with sequence "
        f"parallelism; set parallel.sequence=true"
        for where in mixtures
        if tensor > 1 and not sequence
    ]
    if moe_aux_loss_coef and not mixtures:
        problems.append(
            f"models.moe_aux_loss_coef={moe_aux_loss_coef} has no effect: no trained model has experts; remove it"
        )
    return problems
