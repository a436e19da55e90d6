"""Mixtral: Llama's attention with a mixture of experts behind it.

The router takes the best experts first and their softmax second, which equals Hugging Face's softmax, best experts,
renormalise.
"""

from dataclasses import replace

from rto_megatron.models.families import blocks
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import Experts, ModelShape
from rto_megatron.models.weight_map import MappedParameter


def _layer(shape: ModelShape, index: int) -> tuple[MappedParameter, ...]:
    mixture = blocks.mixture(shape, index, "block_sparse_moe", expert_names=("w1", "w3", "w2"))
    return *blocks.attention(shape, index), *mixture


def _read(config: HfConfig, shape: ModelShape) -> ModelShape:
    config.refuse_short_window(config.values.get("sliding_window"))
    per_token = config.values["num_experts_per_tok"]
    refuse_single_normalized(config, per_token)
    experts = Experts(
        num=config.values["num_local_experts"],
        per_token=per_token,
        ffn_hidden_size=shape.ffn_hidden_size,
        layers=tuple(range(shape.num_layers)),
        is_normalized=True,
    )
    return replace(shape, experts=experts)


def refuse_single_normalized(config: HfConfig, per_token: int) -> None:
    """Raises UserError: one expert a token with normalised probabilities."""
    if per_token < 2:
        config.refuse(
            f"num_experts_per_tok={per_token}; softmax over one chosen expert is always 1, so Megatron's router "
            "cannot express it; expected 2 or more"
        )


def _config(shape: ModelShape) -> dict[str, object]:
    assert shape.experts is not None
    return {
        "num_local_experts": shape.experts.num,
        "num_experts_per_tok": shape.experts.per_token,
        "sliding_window": None,
    }


def _holds(shape: ModelShape) -> bool:
    experts, has_others = shape.experts, shape.latent or shape.has_qkv_bias or shape.has_qk_norm
    if experts is None or has_others or experts.shared_ffn_hidden_size is not None:
        return False
    return experts.is_normalized and shape.is_uniform and experts.ffn_hidden_size == shape.ffn_hidden_size


FAMILY = Family(
    architectures={False: "MixtralForCausalLM", True: "MixtralForSequenceClassification"},
    layer=_layer,
    holds=_holds,
    required=("num_local_experts", "num_experts_per_tok"),
    defaults={"rope_theta": 1e6},
    read=_read,
    config=_config,
)
