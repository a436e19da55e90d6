"""Builds Megatron's GPTModel from a shape: the one place that knows its constructor, its spec and its chatter."""

import logging
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional

from rto_megatron.models.chunks import ModelChunks, StageLayout, cut_of
from rto_megatron.models.experts import forget_probabilities
from rto_megatron.models.fused_layers import fused_settings, is_fused
from rto_megatron.models.layer_specs import block_spec
from rto_megatron.models.modules import GroupedGPT, ScalarHead
from rto_megatron.models.packed_rows import packed_row, row_of
from rto_megatron.models.pipeline_cut import PipelineCut
from rto_megatron.models.rotations import Rotations
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import padded_vocab
from rto_megatron.parallel.context import own_part
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.copies import copied_to
from rto_megatron.types import TokenBatch

_SCHEMES = {"ulysses": "a2a", "gather": "all_gather"}  # parallel.context_scheme -> Megatron's name for it
# Of torch's layers: kernels that are TransformerEngine's or apex's, and compiled ones that nobody has measured.
_NO_FUSIONS = {"bias_activation_fusion": False, "bias_dropout_fusion": False, "apply_rope_fusion": False}
_ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def transformer_config(
    shape: ModelShape,
    topology: Topology,
    dtype: torch.dtype,
    recompute: bool,
    moe_aux_loss_coef: float = 0.0,
    has_scalar_head: bool = False,
    has_fp32_residual: bool = False,
) -> TransformerConfig:
    """Megatron's configuration of a gated, bias-free decoder.

    Args:
        has_scalar_head: counts where stages are balanced (`models.pipeline_cut`).
        moe_aux_loss_coef: weight of the load-balancing loss of a mixture of experts (arXiv 2101.03961, eq. 4), mean
            over the micro-batches of a step; Megatron adds its gradient in the backward pass.
        has_fp32_residual: what layers add to is float32 whatever `dtype` is, and so is what goes between stages.
    """
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=_ACTIVATIONS[shape.activation],
        **_attention(shape),
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **_cut(topology, cut_of(shape, has_scalar_head, topology)),
        params_dtype=dtype,
        pipeline_dtype=torch.float32 if has_fp32_residual else dtype,
        fp32_residual_connection=has_fp32_residual,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # every parameter is loaded through the weight map
        use_cpu_initialization=not topology.device.is_cuda,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default one refuses variable lengths, even without experts
        add_qkv_bias=shape.has_qkv_bias,
        qk_layernorm=shape.has_qk_norm,
        # "none" where there is nothing to balance: other roles of the same run may be dense.
        moe_router_load_balancing_type="aux_loss" if shape.experts else "none",
        moe_aux_loss_coeff=moe_aux_loss_coef if shape.experts else 0.0,
        **_experts(shape, topology),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        cross_entropy_loss_fusion=False,
        **(fused_settings(shape, topology) if is_fused(shape, topology, dtype) else _NO_FUSIONS),
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )


def _attention(shape: ModelShape) -> dict[str, object]:
    """Megatron's settings of what attention sees, by layer, and how positions and scores are scaled."""

    def by_layer(layers: tuple[int, ...]) -> list[int] | None:
        return [int(i in layers) for i in range(shape.num_layers)] if layers else None

    yarn, scale = shape.rotation.yarn, shape.score_scale
    # Queries and keys have the amplitude alike, for where there is one whole heads rotate.
    if yarn is not None:
        scale = (scale or shape.head_dim**-0.5) * yarn.amplitude**2
    return {
        # Tokens before and after the own one.
        "window_size": None if shape.window is None else (shape.window - 1, 0),
        "window_attn_skip_freq": by_layer(shape.windowed_layers),
        "no_rope_freq": by_layer(shape.rotation.unrotated_layers),
        "rotary_interleaved": shape.rotation.is_interleaved,
        "softmax_scale": scale,
    }


def _cut(topology: Topology, layers: PipelineCut) -> dict[str, object]:
    return {
        **_stages(topology, layers),
        "tensor_model_parallel_size": topology.tensor_size,
        "context_parallel_size": topology.context_size,
        "cp_comm_type": _SCHEMES[topology.context_scheme],
        "sequence_parallel": topology.sequence_parallel,
    }


def _stages(topology: Topology, layers: PipelineCut) -> dict[str, object]:
    if topology.pipeline_size == 1:
        return {}
    sizes = {
        "pipeline_model_parallel_size": topology.pipeline_size,
        "pipeline_model_parallel_layout": StageLayout(layers, topology.pipeline_rank),
    }
    if topology.virtual_size == 1:
        return sizes
    # What goes to the next stage and comes from the one before it are matched by order where both are one rank, unless
    # they are exchanged one by one: with 0.19.2's defaults two stages take each other's numbers.
    return {**sizes, "overlap_p2p_comm": True, "batch_p2p_comm": False}


def _experts(shape: ModelShape, topology: Topology) -> dict[str, object]:
    """Megatron's settings of a mixture; none for a dense model, whatever the layout does with experts."""
    experts = shape.experts
    if experts is None:
        return {}
    return {
        "expert_model_parallel_size": topology.groups.ep.size(),
        "expert_tensor_parallel_size": topology.groups.expt_tp.size(),
        "num_moe_experts": experts.num,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        # Softmax over the chosen experts makes their weights sum to 1, softmax over all before the choice does not.
        "moe_router_pre_softmax": not experts.is_normalized,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_shared_expert_gate": experts.has_shared_gate,
        "moe_layer_freq": 1
        if shape.is_uniform
        else [int(i in experts.layers) for i in range(shape.num_layers)],
    }


def build_chunks(
    shape: ModelShape, config: TransformerConfig, topology: Topology, has_scalar_head: bool
) -> ModelChunks:
    """This rank's parts of the model, parameters uninitialised; load them before use."""
    numbers = range(topology.virtual_size)
    return ModelChunks([build_model(shape, config, topology, has_scalar_head, number=n) for n in numbers])


def build_model(
    shape: ModelShape,
    config: TransformerConfig,
    topology: Topology,
    has_scalar_head: bool,
    number: int = 0,
) -> GPTModel:
    """One of this rank's chunks of the model; see `build_chunks`.

    Args:
        number: of the chunk on its stage.
    """
    is_first = topology.is_first_stage and number == 0
    is_last = topology.is_last_stage and number == topology.virtual_size - 1
    own_layers = cut_of(shape, has_scalar_head, topology).own_layers(topology.pipeline_rank, number)
    # GPTModel's notice of 0.19.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    model = GroupedGPT(
        config=config,
        transformer_layer_spec=block_spec(shape, config, topology, own_layers),
        vocab_size=padded_vocab(shape.vocab_size, topology.tensor_size),
        max_sequence_length=shape.max_positions,
        pre_process=is_first,
        post_process=is_last,
        vp_stage=number if topology.virtual_size > 1 else None,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.is_tied and not has_scalar_head,
        position_embedding_type="rope",
        rotary_percent=shape.rotation.share,
        rotary_base=shape.rope_theta,
        rope_scaling=shape.rope_scaling_factor is not None,
        rope_scaling_factor=shape.rope_scaling_factor or 8.0,
        pg_collection=topology.groups,
    )
    if shape.rotation.has_own_angles:
        model.rotary_pos_emb = Rotations(shape, config, topology.groups.cp)
    if shape.embedding_scale != 1 and is_first:
        scale = torch.tensor(
            shape.embedding_scale, dtype=config.params_dtype
        ).item()  # rounded, as Gemma's is
        model.embedding.register_forward_hook(lambda module, inputs, embedded: embedded * scale)
    if has_scalar_head and is_last:
        model.output_layer = ScalarHead(config, topology.tensor_group())
    forget_probabilities(model)
    for module in model.modules():
        # A checkpoint's shards are named by it.
        vars(module).setdefault("tp_group", topology.tensor_group())
    return model.to(topology.device.torch_device)


def forward(model: torch.nn.Module, batch: TokenBatch, topology: Topology) -> Tensor:
    """What comes out of the model's last stage, hidden states of the others.

    A row that is cut over context ranks is read as a packed one, also where its sequences are padded ones.

    Returns:
        [b, s, 1] values of a scalar head; of a language model the states that the output projection reads, [s, b, h]
        with this tensor rank's part of s under sequence parallelism (`engine/readings.py` applies the projection).
        Over context ranks b is 1 and s this rank's part of the row.
    """
    is_cut = topology.context_size > 1

    def as_rows(numbers_T: Tensor) -> Tensor:
        if batch.shared is not None:
            return numbers_T[None]
        if is_cut:
            return numbers_T[None, own_part(len(numbers_T), topology)]
        return numbers_T.view(batch.num_rows, -1)

    shared = batch.shared
    assert shared is None or not is_cut, "of rows that are cut every sequence has a prompt of its own"
    rows = as_rows(batch.tokens_T if shared is None else shared.tokens_K)
    packed = None
    if shared is not None:
        packed = row_of(shared)
    elif is_cut or (batch.num_rows == 1 and len(batch.cu_seqlens) > 2):
        packed = packed_row(batch.cu_seqlens, rows.device)
    positions = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    # Of a mixture in training: padding is no load of an expert.
    config = model.config
    assert isinstance(config, TransformerConfig)
    is_told = model.training and config.num_moe_experts is not None
    padding = as_rows(is_padding(batch)) if is_told else None
    outputs: Tensor = model(
        rows,
        positions,
        None,
        packed_seq_params=packed,
        padding_mask=padding,
        output_processor=_raw_output,
    )
    return outputs


def is_padding(batch: TokenBatch) -> Tensor:
    """True where no sequence is, bool [T], or [K] of what is computed of it."""
    if batch.shared is not None:
        is_padding_K = torch.ones(batch.shared.tokens_K.shape, dtype=torch.bool)
        is_padding_K[: batch.shared.added[len(batch.last_positions)]] = False
        return copied_to(is_padding_K, batch.tokens_T.device)
    is_padding_T = torch.ones(batch.tokens_T.shape, dtype=torch.bool)
    for start, last in zip(batch.cu_seqlens, batch.last_positions, strict=False):
        is_padding_T[start : last + 1] = False
    return copied_to(is_padding_T, batch.tokens_T.device)


def _raw_output(hidden_states: Tensor, output_layer: torch.nn.Module, **_: object) -> Tensor:
    """Called by GPTModel in the place of its output layer."""
    if not isinstance(output_layer, ScalarHead):
        return hidden_states
    values: Tensor = output_layer(hidden_states)[0]
    return values.transpose(0, 1)
