"""TransformerEngine's layers in the place of torch's: their spec, their settings, the names of what they fuse.

A norm lies inside the linear layer behind it, and the matrices of all experts in one module. The rest of the program
knows parameters and checkpoint entries by the names that torch's layers have, whichever layers a model has.
"""

import re
from dataclasses import replace
from functools import partial

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from rto_megatron.models.context_attention import context_attention
from rto_megatron.models.experts import WatchedRouter
from rto_megatron.models.layout_checks import own_layer_parts
from rto_megatron.models.rotation_shape import PLAIN_ROTATION
from rto_megatron.models.shape import ModelShape
from rto_megatron.parallel.topology import Topology

_PLAIN_NAMES = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_(\w+)$"), r"input_layernorm.\1"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_(\w+)$"), r"pre_mlp_layernorm.\1"),
    (re.compile(r"experts\.(linear_fc[12])\.weight(\d+)$"), r"experts.local_experts.\2.\1.weight"),
)


def is_fused(shape: ModelShape, topology: Topology, dtype: torch.dtype) -> bool:
    """Whether a model has these layers.

    In float32 it has torch's, as TransformerEngine's attention is for 16 bits; and so it has where parts of it are
    modules of this package.
    """
    if dtype == torch.float32 or own_layer_parts(shape):
        return False
    return topology.device.kernels == "transformer_engine"


def fused_settings(shape: ModelShape, topology: Topology) -> dict[str, object]:
    """What these layers need of Megatron's configuration, and the fusions that lie between them."""
    is_cuda, has_experts = topology.device.is_cuda, shape.experts is not None
    # Each tensor is scaled by what is in it: no history that a checkpoint would have to keep. Gradients have e5m2.
    eight_bits = {"fp8": "hybrid", "fp8_recipe": "tensorwise"} if topology.device.has_fp8 else {}
    return {
        **eight_bits,
        "moe_grouped_gemm": has_experts,
        "moe_permute_fusion": has_experts and is_cuda,
        # Megatron's fused GELU is its tanh approximation, whatever the model has.
        "bias_activation_fusion": shape.activation == "silu",
        "bias_dropout_fusion": True,
        # The fused kernel knows rows that are cut sequence by sequence, not as parallel.context cuts them.
        "apply_rope_fusion": is_cuda and topology.context_size == 1 and shape.rotation == PLAIN_ROTATION,
    }


def fused_layer_spec(shape: ModelShape, config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    """The modules of a layer, with this package's router and, where rows are cut, its attention.

    Args:
        num_experts: None: a dense layer.
    """
    layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(
        num_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )
    layer.submodules.sharded_state_dict_keys_map = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    if config.context_parallel_size > 1:
        layer.submodules.self_attention.submodules.core_attention = context_attention(config)
    if num_experts is not None:
        parts: MoESubmodules = layer.submodules.mlp.keywords["submodules"]
        layer.submodules.mlp = partial(MoELayer, submodules=replace(parts, router=WatchedRouter))
    return layer


def plain_name(name: str) -> str:
    """A parameter's name where nothing is fused.

    Example:
        plain_name("decoder.layers.0.mlp.linear_fc1.layer_norm_weight") == "decoder.layers.0.pre_mlp_layernorm.weight"
    """
    for pattern, plain in _PLAIN_NAMES:
        name = pattern.sub(plain, name)
    return name
