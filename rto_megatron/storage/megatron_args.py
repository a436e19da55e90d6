"""Megatron-LM's arguments, which it keeps in every checkpoint: written for our shapes, and read as one.

Names are those of megatron-core 0.19.2, training/checkpointing.py:load_args_from_checkpoint.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rto_megatron.errors import ModelFolderError, refuse_if
from rto_megatron.models.families import FAMILIES
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.rotation_shape import LongRope, Rotation, Yarn
from rto_megatron.models.shape import Experts, ModelShape
from rto_megatron.models.weight_map import padded_vocab
from rto_megatron.storage.megatron_common import read_args
from rto_megatron.storage.megatron_names import VOCABULARY_MULTIPLE

_FIXED = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "apply_layernorm_1p": False,
    "squared_relu": False,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
}
# Parts that no family has and that weights do not betray; what they are when off.
_OFF = {
    "layernorm_zero_centered_gamma": False,  # apply_layernorm_1p of earlier versions
    "quick_geglu": False,
    "qk_l2_norm": False,
    "no_rope_freq": None,
    "rotary_seq_len_interpolation_factor": None,
    "window_size": None,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "apply_residual_connection_post_layernorm": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "use_mup": False,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
}
_NEEDED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings"),
    "padded_vocab_size",
)
# Of no consequence for the weights, or not known to Megatron's arguments.
PARTS = "parts_beyond_megatron_lm"  # of ours: what Megatron-LM has no argument for, or an argument of other models
_NOT_COMPARED = {"family", "vocab_size", "max_positions", "init_std", "latent"}
_CHECKPOINT_VERSION = 3.0


def common_state(shape: ModelShape, has_scalar_head: bool, dtype: torch.dtype) -> dict[str, object]:
    """What Megatron keeps beside tensors, so that it takes the model's sizes from the checkpoint."""
    values = {
        **_FIXED,
        **_sizes(shape),
        **_mixture(shape),
        "multi_latent_attention": shape.latent is not None,
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "untie_embeddings_and_output_weights": has_scalar_head or not shape.is_tied,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "ckpt_format": "torch_dist",
        "tokenizer_type": "HuggingFaceTokenizer",
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    if shape.own_parts:
        values[PARTS] = parts_of(shape)
        values |= _named_parts(shape)
    return {"args": argparse.Namespace(**values), "checkpoint_version": _CHECKPOINT_VERSION, "iteration": 0}


def _sizes(shape: ModelShape) -> dict[str, object]:
    values: dict[str, object] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "seq_length": shape.max_positions,
        "max_position_embeddings": shape.max_positions,
        "num_attention_heads": shape.num_heads,
        "group_query_attention": shape.num_kv_heads != shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "norm_epsilon": shape.norm_eps,
        "layernorm_epsilon": shape.norm_eps,  # the name of 0.19
        "rotary_base": int(shape.rope_theta) if shape.rope_theta.is_integer() else shape.rope_theta,
        "use_rope_scaling": shape.rope_scaling_factor is not None,
        "rope_scaling_factor": shape.rope_scaling_factor or 8.0,
        "init_method_std": shape.init_std,
        "vocab_size": shape.vocab_size,
        "padded_vocab_size": padded_vocab(shape.vocab_size, VOCABULARY_MULTIPLE),
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "add_qkv_bias": shape.has_qkv_bias,
        "qk_layernorm": shape.has_qk_norm or shape.latent is not None,
    }
    if shape.latent is not None:
        values.update(
            q_lora_rank=shape.latent.q_rank,
            kv_lora_rank=shape.latent.kv_rank,
            qk_head_dim=shape.latent.nope_dim,
            qk_pos_emb_head_dim=shape.latent.rope_dim,
            v_head_dim=shape.latent.value_dim,
        )
    return values


def parts_of(shape: ModelShape) -> dict[str, object]:
    """What a shape has beyond Llama's decoder, as plain values."""
    return {name: asdict(shape)[name] for name in shape.own_parts}


def _named_parts(shape: ModelShape) -> dict[str, object]:
    """Those that Megatron-LM has arguments for, under their names."""
    rotation, unrotated = shape.rotation, shape.rotation.unrotated_layers
    values: dict[str, object] = {
        "rotary_percent": rotation.share,
        "rotary_interleaved": rotation.is_interleaved,
        "apply_layernorm_1p": shape.has_shifted_norms,
        "layernorm_zero_centered_gamma": shape.has_shifted_norms,
        "no_rope_freq": [int(i in unrotated) for i in range(shape.num_layers)] if unrotated else None,
        "window_size": None if shape.window is None else (shape.window - 1, 0),
    }
    if shape.windowed_layers:
        values["window_attn_skip_freq"] = [int(i in shape.windowed_layers) for i in range(shape.num_layers)]
    return values


def beyond_megatron_lm(shape: ModelShape) -> str | None:
    """One sentence about the parts for which Megatron-LM has no argument; None: it can be told all of them."""
    rotation, parts = (
        shape.rotation,
        set(shape.own_parts) - {"window", "windowed_layers", "has_shifted_norms"},
    )
    if not rotation.has_own_angles:
        parts -= {"rotation"}
    if not parts:
        return None
    return (
        f"Megatron-LM has no arguments for {', '.join(sorted(parts))} of {shape.family}, and without them computes "
        f"another model: the checkpoint, whose arguments keep them as {PARTS}, is for stages here and the way back"
    )


def _mixture(shape: ModelShape) -> dict[str, object]:
    experts = shape.experts
    if experts is None:
        return {"num_experts": None, "moe_layer_freq": 1}
    frequency = 1 if shape.is_uniform else [int(i in experts.layers) for i in range(shape.num_layers)]
    values: dict[str, object] = {
        "num_experts": experts.num,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": frequency,
        "moe_router_pre_softmax": not experts.is_normalized,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_shared_expert_gate": experts.has_shared_gate,
        "moe_router_score_function": "softmax" if experts.routing is None else "sigmoid",
        "moe_router_enable_expert_bias": experts.routing is not None,
    }
    if experts.routing is not None:
        values.update(
            moe_router_pre_softmax=False,
            moe_router_num_groups=experts.routing.num_groups,
            moe_router_group_topk=experts.routing.groups_per_token,
            moe_router_topk_scaling_factor=experts.routing.scale,
        )
    return values


def shape_of_args(args: argparse.Namespace, where: Path) -> ModelShape:
    """The shape that Megatron-LM trained, under the first model type of transformers that has its parts.

    Args:
        where: the checkpoint, for errors.

    Raises:
        ModelFolderError: the model is of no family, or an argument is absent; names all of them.
    """
    values = vars(args)
    own = _own_parts(values)
    expected = _FIXED | _OFF | (_named_parts(_shape(values, own)) if own else {})
    wrong = [
        f"{k}={values[k]!r} instead of {want!r}"
        for k, want in expected.items()
        if _plain(values.get(k, want)) != _plain(want)
    ]
    wrong += [f"no {key}" for key in _NEEDED if values.get(key) is None]
    refuse_if(wrong, f"{where} was trained as no model type of {sorted(FAMILIES)} can be", ModelFolderError)
    shape = _shape(values, own)
    family = next((name for name, family in FAMILIES.items() if family.holds(shape)), None)
    if family is None:
        raise ModelFolderError(
            f"{where} was trained with parts that no model type of {sorted(FAMILIES)} has together: qkv bias "
            f"{shape.has_qkv_bias}, norms on q and k {shape.has_qk_norm}, {shape.experts or 'no experts'}"
            f"{''.join(f', {name} {value}' for name, value in shape.own_parts.items())}"
        )
    return replace(shape, family=family)


def require_agreement(config: HfConfig, shape: ModelShape, is_scalar: bool, weights: Path) -> None:
    """Compares config.json with the arguments that Megatron keeps in the checkpoint, where it keeps any.

    Raises:
        UserError: they describe two models; names what differs. Most of it no shape of a tensor would show.
    """
    args = read_args(weights)
    if args is None or shape.latent is not None:
        return
    described, trained = asdict(shape), asdict(shape_of_args(args, weights))
    ignored = _NOT_COMPARED | {"is_tied"} if is_scalar else _NOT_COMPARED
    differing = [
        f"{name}={value!r}, trained with {trained[name]!r}"
        for name, value in described.items()
        if name not in ignored and value != trained[name]
    ]
    refuse_if(differing, f"{config.path} does not describe the model in {weights}", ModelFolderError)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _own_parts(values: dict[str, Any]) -> dict[str, Any]:
    """What `parts_of` wrote; of Megatron-LM's own checkpoints the layers that do not rotate, which it can say."""
    parts = dict(values.get(PARTS) or {})
    rotation = dict(parts.pop("rotation", {}))
    yarn, longrope = rotation.pop("yarn", None), rotation.pop("longrope", None)
    unrotated = values.get("no_rope_freq")
    if isinstance(unrotated, list | tuple):
        rotation["unrotated_layers"] = tuple(i for i, is_without in enumerate(unrotated) if is_without)
    if rotation:
        parts["rotation"] = Rotation(
            **rotation,
            yarn=None if yarn is None else Yarn(**yarn),
            longrope=None if longrope is None else LongRope(**longrope),
        )
    return parts


def _shape(values: dict[str, Any], parts: dict[str, Any]) -> ModelShape:
    heads = values["num_attention_heads"]
    kv_heads = values.get("num_query_groups") if values.get("group_query_attention") else heads
    scaling = values.get("rope_scaling_factor", 8.0) if values.get("use_rope_scaling") else None
    return ModelShape(
        family="",
        num_layers=values["num_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["ffn_hidden_size"],
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_dim=values.get("kv_channels") or values["hidden_size"] // heads,
        vocab_size=values.get("vocab_size") or values["padded_vocab_size"],
        max_positions=values["max_position_embeddings"],
        norm_eps=values.get("layernorm_epsilon") or values.get("norm_epsilon", 1e-5),
        rope_theta=float(values.get("rotary_base", 10000)),
        rope_scaling_factor=scaling,
        is_tied=not values.get("untie_embeddings_and_output_weights", False),
        init_std=values.get("init_method_std", 0.02),
        has_qkv_bias=bool(values.get("add_qkv_bias")),
        has_qk_norm=bool(values.get("qk_layernorm")),
        experts=_experts_of(values),
        **parts,
    )


def _experts_of(values: dict[str, Any]) -> Experts | None:
    if not values.get("num_experts"):
        return None
    frequency, layers = values.get("moe_layer_freq", 1), range(values["num_layers"])
    if isinstance(frequency, int):
        frequency = [int(i % frequency == 0) for i in layers]
    return Experts(
        num=values["num_experts"],
        per_token=values.get("moe_router_topk", 2),
        ffn_hidden_size=values.get("moe_ffn_hidden_size") or values["ffn_hidden_size"],
        layers=tuple(i for i in layers if frequency[i]),
        is_normalized=not values.get("moe_router_pre_softmax", False),
        shared_ffn_hidden_size=values.get("moe_shared_expert_intermediate_size"),
        has_shared_gate=bool(values.get("moe_shared_expert_gate")),
    )
