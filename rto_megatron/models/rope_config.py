"""How config.json says that positions rotate heads: read from the keys of two transformers versions, and written.

Kinds beside the plain one, of which a family names those that it has (`Family.ropes`): llama3 (Megatron's scaling of
Llama 3.1), yarn, linear, longrope, partial (a share of each head), by_layer (layers with a window have a base of their
own).
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.rotation_shape import PLAIN_ROTATION, LongRope, Rotation, Yarn
from rto_megatron.models.shape import ModelShape

# What megatron-core's RotaryEmbedding hard-codes for Llama-3.1 scaling.
MEGATRON_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LOCAL_THETA = 10000.0  # of Gemma 3, where config.json has none
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # transformers' defaults
_LONGROPE_REFUSED = ("factor", "attention_factor", "short_mscale", "long_mscale")
_YARN_REFUSED = ("attention_factor", "attn_factor", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class FoundRope:
    """What config.json says.

    Example:
        FoundRope(theta=5e5, llama3_factor=8.0, rotation=Rotation(), stretched_positions=0)
    """

    theta: float
    llama3_factor: float | None
    rotation: Rotation
    stretched_positions: int  # that yarn makes of those of pretraining; 0 without it


def read_rope(config: HfConfig, kinds: Collection[str]) -> FoundRope:
    """Reads rotation and its base.

    Args:
        kinds: of the family.

    Raises:
        UserError: the family here has no such rotation.
    """
    rope: dict[str, Any] = config.rope
    local: float | None = None
    if any(isinstance(value, dict) for value in rope.values()):
        rope, local = _by_layer(config, rope, kinds)
    elif "by_layer" in kinds:
        local = float(config.values.get("rope_local_base_freq") or _LOCAL_THETA)
    theta = float(rope.get("rope_theta") or config.values.get("rope_theta") or 10000.0)
    rotation = replace(PLAIN_ROTATION, share=_share(config, rope, kinds), windowed_theta=local)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    found = {key: rope.get(key) for key in MEGATRON_ROPE}
    if kind == "default":
        return FoundRope(theta, None, rotation, 0)
    if kind == "llama3" in kinds and found == MEGATRON_ROPE:
        return FoundRope(theta, float(rope["factor"]), rotation, 0)
    if kind == "linear" in kinds:
        return FoundRope(theta, None, replace(rotation, divisor=float(rope["factor"])), 0)
    if kind in ("longrope", "su") and "longrope" in kinds:
        longrope = _longrope(config, rope)
        return FoundRope(theta, None, replace(rotation, longrope=longrope), 0)
    if kind == "yarn" in kinds:
        yarn = _yarn(config, rope)
        return FoundRope(
            theta, None, replace(rotation, yarn=yarn), int(yarn.factor * yarn.original_positions)
        )
    known = ", ".join(sorted({"llama3", "linear", "yarn", "longrope"} & set(kinds))) or "no scaling"
    config.refuse(
        f"rope scaling {rope} cannot be expressed here; this family has {known}, and of llama3 megatron-core knows "
        f"{MEGATRON_ROPE}"
    )
    raise AssertionError  # refuse raises


def _by_layer(config: HfConfig, rope: dict[str, Any], kinds: Collection[str]) -> tuple[dict[str, Any], float]:
    """transformers 5 keeps an entry for each kind of layer."""
    if "by_layer" not in kinds:
        config.refuse(f"rope scaling {rope} is one for each kind of layer; this family here has one for all")
    local = rope.get("sliding_attention") or {}
    if (local.get("rope_type") or "default") != "default":
        config.refuse(f"rope scaling {local} of layers with a window; here only the others' can be scaled")
    return rope.get("full_attention") or {}, float(local.get("rope_theta") or _LOCAL_THETA)


def _share(config: HfConfig, rope: dict[str, Any], kinds: Collection[str]) -> float:
    share = float(rope.get("partial_rotary_factor", config.values.get("partial_rotary_factor")) or 1.0)
    if share != 1 and "partial" not in kinds:
        config.refuse(f"partial_rotary_factor={share}; positions rotate whole heads here")
    return share


def _yarn(config: HfConfig, rope: dict[str, Any]) -> Yarn:
    set_apart = [key for key in _YARN_REFUSED if rope.get(key) is not None]
    set_apart += ["truncate"] if rope.get("truncate", True) is not True else []
    if set_apart or rope.get("factor") is None:
        config.refuse(
            f"rope scaling {rope}: yarn here takes factor, original_max_position_embeddings, beta_fast and beta_slow, "
            f"and of them factor must be there; found {set_apart or 'no factor'}"
        )
    original = rope.get("original_max_position_embeddings") or config.values["max_position_embeddings"]
    betas = {key: float(rope.get(key) or default) for key, default in _YARN.items()}
    return Yarn(float(rope["factor"]), int(original), **betas)


def _longrope(config: HfConfig, rope: dict[str, Any]) -> LongRope:
    set_apart = [key for key in _LONGROPE_REFUSED if rope.get(key) is not None]
    if set_apart:
        config.refuse(f"{set_apart} of rope scaling are set; longrope here follows from the positions alone")
    positions = config.values["max_position_embeddings"]
    factors = [tuple(map(float, rope.get(key) or ())) for key in ("short_factor", "long_factor")]
    heads = config.values["num_attention_heads"]
    head_dim = config.values.get("head_dim") or config.values["hidden_size"] // heads
    wanted = int(head_dim * _share(config, rope, {"partial"})) // 2
    if any(len(found) != wanted for found in factors):
        config.refuse(
            f"rope scaling has {len(factors[0])} short and {len(factors[1])} long factors; expected {wanted}, one for "
            "every frequency"
        )
    inside = rope.get("original_max_position_embeddings")
    original = config.values.get("original_max_position_embeddings") or inside or positions
    return LongRope(factors[0], factors[1], int(original), int(positions))


def rope_keys(shape: ModelShape) -> dict[str, object]:
    """The keys of config.json that `read_rope` reads, as transformers 4 and 5 both do."""
    rotation, scaling = shape.rotation, None
    if shape.rope_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": shape.rope_scaling_factor, **MEGATRON_ROPE}
    if rotation.divisor != 1:
        scaling = {"rope_type": "linear", "factor": rotation.divisor}
    if (yarn := rotation.yarn) is not None:
        scaling = {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_positions,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
        }
    if (longrope := rotation.longrope) is not None:
        scaling = {
            "rope_type": "longrope",
            "short_factor": list(longrope.short_factors),
            "long_factor": list(longrope.long_factors),
            "original_max_position_embeddings": longrope.original_positions,
        }
    keys: dict[str, object] = {"rope_theta": shape.rope_theta, "rope_scaling": scaling}
    if rotation.share != 1:
        keys["partial_rotary_factor"] = rotation.share
    if rotation.windowed_theta is not None:
        keys["rope_local_base_freq"] = rotation.windowed_theta
    return keys
