"""Which modules a family's layers are made of: Megatron's local ones, and this package's in their places."""

from collections.abc import Iterable
from functools import partial

from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from rto_megatron.models.context_attention import context_attention
from rto_megatron.models.experts import with_grouped_experts
from rto_megatron.models.families import FAMILIES
from rto_megatron.models.family_layers import FamilyAttention, FamilyLayer
from rto_megatron.models.fused_layers import fused_layer_spec, is_fused
from rto_megatron.models.norms import NormBuilder, RMSNorm, ShiftedRMSNorm
from rto_megatron.models.shape import ModelShape
from rto_megatron.parallel.topology import Topology


def norm_of(shape: ModelShape) -> NormBuilder:
    """The class of a family's norms."""
    return ShiftedRMSNorm if shape.has_shifted_norms else RMSNorm


def layer_spec(shape: ModelShape, config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    """The modules of a layer: Megatron's local ones, with this package's norm, core attention, experts and router.

    Args:
        num_experts: None: a dense layer.
    """
    layer: ModuleSpec = get_gpt_layer_local_spec(
        num_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    norm = norm_of(shape)
    first = IdentityOp if shape.norms == "after" else norm
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = first
    if shape.norms != "before" or shape.residual_scale != 1:
        layer.module = FamilyLayer
        behind = None if shape.norms == "before" else norm
        layer.params = {**layer.params, "behind": behind, "scale": shape.residual_scale}
    attention = layer.submodules.self_attention
    rotation = shape.rotation
    if shape.has_whole_qk_norm or rotation.windowed_theta is not None or rotation.longrope is not None:
        attention.module = FamilyAttention
        attention.params = {**attention.params, "shape": shape}
    core = context_attention(config)
    attention.submodules.core_attention = (
        core if shape.score_softcap is None else partial(core, softcap=shape.score_softcap)
    )
    if config.qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = norm
    # The fused-norm key names of TransformerEngine would hide which parameter a checkpoint entry is.
    layer.submodules.sharded_state_dict_keys_map = {}
    return layer if num_experts is None else with_grouped_experts(layer)


def block_spec(
    shape: ModelShape, config: TransformerConfig, topology: Topology, own_layers: Iterable[int]
) -> TransformerBlockSubmodules:
    """The layers of one chunk of a pipeline stage, counted from 0 in the model, with the norm behind the last."""
    make, norm = FAMILIES[shape.family].layer_spec or layer_spec, norm_of(shape)
    if is_fused(shape, topology, config.params_dtype):
        make, norm = fused_layer_spec, TENorm
    dense = make(shape, config, None)
    sparse = dense if shape.experts is None else make(shape, config, shape.experts.num)
    with_experts = () if shape.experts is None else shape.experts.layers
    return TransformerBlockSubmodules(
        layer_specs=[sparse if i in with_experts else dense for i in own_layers], layer_norm=norm
    )
