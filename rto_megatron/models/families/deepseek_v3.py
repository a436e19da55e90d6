"""DeepSeek-V3: multi-head latent attention and grouped sigmoid routing. Weights convert; no model is built here.

The names are those of megatron-core's MLATransformerConfig with TransformerEngine.
"""

import re
from dataclasses import replace

from rto_megatron.models.families import blocks, qwen3_moe
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import Experts, GroupedRouting, LatentAttention, ModelShape
from rto_megatron.models.weight_map import MappedParameter, Replicated, Split

_EXPERT_KEYS = (
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "first_k_dense_replace",
)
_LATENT_KEYS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _attention(shape: ModelShape, index: int) -> tuple[MappedParameter, ...]:
    latent = shape.latent
    assert latent is not None
    hf, mg = f"model.layers.{index}.self_attn", f"decoder.layers.{index}.self_attention"
    hidden, heads = shape.hidden_size, shape.num_heads
    q = heads * (latent.nope_dim + latent.rope_dim)
    kv_down = latent.kv_rank + latent.rope_dim
    kv_up = heads * (latent.nope_dim + latent.value_dim)

    def linear(ours: str, theirs: str, rows: int, columns: int, is_split: bool) -> MappedParameter:
        layout = Split(0) if is_split else Replicated()
        return blocks.matrix(f"{mg}.{ours}.weight", f"{hf}.{theirs}.weight", (rows, columns), layout, index)

    if latent.q_rank is None:
        queries = [linear("linear_q_proj", "q_proj", q, hidden, True)]
    else:
        queries = [
            linear("linear_q_down_proj", "q_a_proj", latent.q_rank, hidden, False),
            blocks.norm(f"{mg}.q_layernorm.weight", f"{hf}.q_a_layernorm.weight", latent.q_rank, index),
            linear("linear_q_up_proj", "q_b_proj", q, latent.q_rank, True),
        ]
    before = f"decoder.layers.{index}.input_layernorm.weight"
    out = (hidden, heads * latent.value_dim)
    return (
        blocks.norm(before, f"model.layers.{index}.input_layernorm.weight", hidden, index),
        *queries,
        linear("linear_kv_down_proj", "kv_a_proj_with_mqa", kv_down, hidden, False),
        blocks.norm(f"{mg}.kv_layernorm.weight", f"{hf}.kv_a_layernorm.weight", latent.kv_rank, index),
        linear("linear_kv_up_proj", "kv_b_proj", kv_up, latent.kv_rank, True),
        blocks.matrix(f"{mg}.linear_proj.weight", f"{hf}.o_proj.weight", out, Split(1), index),
    )


def _layer(shape: ModelShape, index: int) -> tuple[MappedParameter, ...]:
    experts = shape.experts
    assert experts is not None
    if index not in experts.layers:
        return *_attention(shape, index), *blocks.dense(shape, index)
    bias = MappedParameter(
        f"decoder.layers.{index}.mlp.router.expert_bias",
        (f"model.layers.{index}.mlp.gate.e_score_correction_bias",),
        ((experts.num,),),
        Replicated(),
        index,
        is_float32=True,  # the choice of experts hangs on its last bits
    )
    mixture = blocks.mixture(shape, index, "mlp", qwen3_moe.EXPERT_NAMES)
    shared = blocks.shared_expert(shape, index, "mlp.shared_experts")
    return *_attention(shape, index), *mixture, bias, *shared


def _read(config: HfConfig, shape: ModelShape) -> ModelShape:
    values = config.values
    if values.get("scoring_func", "sigmoid") != "sigmoid" or values.get("moe_layer_freq", 1) != 1:
        config.refuse(
            "expected DeepSeek-V3's sigmoid scores and experts in every layer after the first dense ones"
        )
    routing = GroupedRouting(
        values["n_group"], values["topk_group"], values.get("routed_scaling_factor", 1.0)
    )
    experts = Experts(
        num=values["n_routed_experts"],
        per_token=values["num_experts_per_tok"],
        ffn_hidden_size=values["moe_intermediate_size"],
        layers=tuple(range(values["first_k_dense_replace"], shape.num_layers)),
        is_normalized=bool(values.get("norm_topk_prob", True)),
        shared_ffn_hidden_size=values["n_shared_experts"] * values["moe_intermediate_size"],
        routing=routing,
    )
    latent = LatentAttention(
        q_rank=values.get("q_lora_rank"),
        kv_rank=values["kv_lora_rank"],
        nope_dim=values["qk_nope_head_dim"],
        rope_dim=values["qk_rope_head_dim"],
        value_dim=values["v_head_dim"],
    )
    return replace(shape, head_dim=latent.nope_dim + latent.rope_dim, experts=experts, latent=latent)


def _config(shape: ModelShape) -> dict[str, object]:
    experts, latent = shape.experts, shape.latent
    assert experts is not None and latent is not None and experts.routing is not None
    assert experts.shared_ffn_hidden_size is not None
    return {
        "n_routed_experts": experts.num,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "n_shared_experts": experts.shared_ffn_hidden_size // experts.ffn_hidden_size,
        "first_k_dense_replace": shape.num_layers - len(experts.layers),
        "norm_topk_prob": experts.is_normalized,
        "n_group": experts.routing.num_groups,
        "topk_group": experts.routing.groups_per_token,
        "routed_scaling_factor": experts.routing.scale,
        "head_dim": latent.rope_dim,  # to transformers it is the part that rotates
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
    }


def _left_aside(shape: ModelShape) -> dict[re.Pattern[str], str]:
    predictor = re.compile(rf"model\.layers\.{shape.num_layers}\..*")
    return {predictor: "multi-token prediction, which is not part of the language model"}


FAMILY = Family(
    architectures={False: "DeepseekV3ForCausalLM", True: "DeepseekV3ForSequenceClassification"},
    layer=_layer,
    holds=lambda shape: shape.latent is not None,
    required=(*_EXPERT_KEYS, *_LATENT_KEYS),
    read=_read,
    config=_config,
    left_aside=_left_aside,
    not_run="multi-head latent attention needs TransformerEngine's layers, and this program builds megatron-core's "
    "local ones; its weights can be converted, for Megatron-LM on TransformerEngine",
)
