"""Gemma 2: norms around attention and feed-forward network that multiply by 1 + weight, a window on every second layer,
soft caps of scores and logits, embeddings times sqrt(hidden size)."""

from dataclasses import replace
from typing import Any

from rto_megatron.models.families import blocks
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import Activation, ModelShape
from rto_megatron.models.weight_map import MappedParameter

ACTIVATIONS: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh"}
REQUIRED = ("head_dim", "query_pre_attn_scalar")
_NORMS = blocks.NormNames(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def layer(shape: ModelShape, index: int) -> tuple[MappedParameter, ...]:
    """Attention and feed-forward network with four norms."""
    return *blocks.attention(shape, index, _NORMS), *blocks.dense(shape, index, _NORMS)


def read_layers(config: HfConfig, shape: ModelShape, window_every: int) -> ModelShape:
    """What Gemma 2 and 3 share.

    Args:
        window_every: one layer in so many has no window, where config.json does not list them.
    """
    values: dict[str, Any] = config.values
    kinds = values.get("layer_types") or [
        "sliding_attention" if (i + 1) % window_every else "full_attention" for i in range(shape.num_layers)
    ]
    if len(kinds) != shape.num_layers:
        config.refuse(
            f"layer_types has {len(kinds)} entries; expected one for each of {shape.num_layers} layers"
        )
    windowed = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    window = values.get("sliding_window") if windowed else None
    if windowed and window is None:
        config.refuse(
            "sliding_window is null and layer_types has sliding_attention; expected a number of tokens"
        )
    return replace(
        shape,
        window=window,
        windowed_layers=windowed,
        norms="around",
        has_shifted_norms=True,
        embedding_scale=shape.hidden_size**0.5,
        score_scale=values["query_pre_attn_scalar"] ** -0.5,
        score_softcap=values.get("attn_logit_softcapping"),
        logit_softcap=values.get("final_logit_softcapping"),
    )


def config_keys(shape: ModelShape) -> dict[str, object]:
    """The keys that `read_layers` reads."""
    assert shape.score_scale is not None
    windowed = shape.windowed_layers
    return {
        "layer_types": [
            "sliding_attention" if i in windowed else "full_attention" for i in range(shape.num_layers)
        ],
        "sliding_window": shape.window,
        "query_pre_attn_scalar": round(shape.score_scale**-2),
        "attn_logit_softcapping": shape.score_softcap,
        "final_logit_softcapping": shape.logit_softcap,
        "attention_bias": False,
    }


FAMILY = Family(
    architectures={False: "Gemma2ForCausalLM", True: "Gemma2ForSequenceClassification"},
    layer=layer,
    holds=lambda shape: shape.has_shifted_norms and shape.norms == "around" and not shape.has_qk_norm,
    required=REQUIRED,
    defaults={
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    refused=("attention_bias", "use_bidirectional_attention"),
    ropes=frozenset(),
    activations=ACTIVATIONS,
    activation_key="hidden_activation",
    read=lambda config, shape: read_layers(config, shape, 2),
    config=config_keys,
)
