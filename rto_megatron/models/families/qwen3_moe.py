"""Qwen3-MoE: Qwen3's attention; layers with experts and dense ones may alternate."""

from dataclasses import replace

from rto_megatron.models.families import blocks, mixtral, qwen2
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import Experts, ModelShape
from rto_megatron.models.weight_map import MappedParameter

REQUIRED = ("num_experts_per_tok", "moe_intermediate_size")
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")


def _layer(shape: ModelShape, index: int) -> tuple[MappedParameter, ...]:
    assert shape.experts is not None
    if index in shape.experts.layers:
        behind = blocks.mixture(shape, index, "mlp", EXPERT_NAMES)
    else:
        behind = blocks.dense(shape, index)
    return *blocks.attention(shape, index), *behind


def read_experts(config: HfConfig, shape: ModelShape) -> Experts:
    """What Qwen's mixtures share: which layers have experts, their sizes, and whether probabilities are renormalised.

    Raises:
        UserError: the number of experts is missing, or the routing cannot be expressed.
    """
    values = config.values
    # transformers 5 writes Qwen3-MoE's under Mixtral's name; earlier versions and Qwen's own files do not.
    num_key = "num_local_experts" if "num_local_experts" in values else "num_experts"
    config.require(num_key)
    step = values.get("decoder_sparse_step") or 1
    dense = set(values.get("mlp_only_layers") or [])
    is_normalized = bool(values.get("norm_topk_prob", False))
    if is_normalized:
        mixtral.refuse_single_normalized(config, values["num_experts_per_tok"])
    layers = tuple(i for i in range(shape.num_layers) if i not in dense and (i + 1) % step == 0)
    if not layers:
        config.refuse("no layer has experts; expected a mixture of experts, use the dense model type")
    return Experts(
        num=values[num_key],
        per_token=values["num_experts_per_tok"],
        ffn_hidden_size=values["moe_intermediate_size"],
        layers=layers,
        is_normalized=is_normalized,
    )


def _read(config: HfConfig, shape: ModelShape) -> ModelShape:
    qwen2.refuse_window(config)
    return replace(shape, has_qk_norm=True, experts=read_experts(config, shape))


def experts_config(shape: ModelShape) -> dict[str, object]:
    """The keys that `read_experts` reads."""
    experts = shape.experts
    assert experts is not None
    return {
        "num_experts": experts.num,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "norm_topk_prob": experts.is_normalized,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(shape.num_layers) if i not in experts.layers],
        "use_sliding_window": False,
    }


def _holds(shape: ModelShape) -> bool:
    is_mixture = shape.experts is not None and shape.experts.shared_ffn_hidden_size is None
    return is_mixture and shape.latent is None and shape.has_qk_norm and not shape.has_qkv_bias


FAMILY = Family(
    architectures={False: "Qwen3MoeForCausalLM", True: "Qwen3MoeForSequenceClassification"},
    layer=_layer,
    holds=_holds,
    required=("head_dim", *REQUIRED),
    read=_read,
    config=lambda shape: {**experts_config(shape), "attention_bias": False},
)
