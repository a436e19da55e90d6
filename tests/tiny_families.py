"""Tiny random folders of every model family in Hugging Face format: the oracle of the Megatron models."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GraniteConfig,
    GranitePreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification


class GraniteForSequenceClassification(GenericForSequenceClassification, GranitePreTrainedModel):
    """transformers has none: of its parts."""


AutoModelForSequenceClassification.register(GraniteConfig, GraniteForSequenceClassification, exist_ok=True)

# Four layers for two pipeline stages; two key-value groups of two heads; every split dimension is even.
COMMON: dict[str, object] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 1,
}
_QWEN_EXPERTS: dict[str, object] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
_QWEN2_MOE: dict[str, object] = {
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 80,
    "norm_topk_prob": False,
    **_QWEN_EXPERTS,
}
_QWEN3_MOE: dict[str, object] = {
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "norm_topk_prob": True,
    **_QWEN_EXPERTS,
}

# name -> what it changes in COMMON; each family of models/families has a variant of its own name.
VARIANTS: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama"},
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3_tied": {
        "model_type": "llama",
        "vocab_size": 97,
        "tie_word_embeddings": True,
        "max_position_embeddings": 16384,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral": {
        "model_type": "mistral",
        "head_dim": 24,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.5},  # not a whole number
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True, "vocab_size": 97},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3_tied": {
        "model_type": "qwen3",
        "head_dim": 32,
        "tie_word_embeddings": True,
        "vocab_size": 97,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 0]},
    "olmo2": {"model_type": "olmo2"},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.1,
        "logits_scaling": 3.0,
    },
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 24,
        "query_pre_attn_scalar": 20,
        "sliding_window": 3,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "head_dim": 24,
        "query_pre_attn_scalar": 20,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
        "vocab_size": 97,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
        },
    },
    "glm4": {
        "model_type": "glm4",
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    },
    "seed_oss": {"model_type": "seed_oss", "head_dim": 32},
    "phi3": {"model_type": "phi3", "sliding_window": 3},
    "phi3_longrope": {
        "model_type": "phi3",
        "tie_word_embeddings": True,
        "vocab_size": 97,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.25, 1.5, 2.0, 3.0, 5.0],
            "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
            "original_max_position_embeddings": 64,
        },
    },
    "mixtral": {
        "model_type": "mixtral",
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen2_moe": _QWEN2_MOE,
    "qwen2_moe_normalized": {**_QWEN2_MOE, "norm_topk_prob": True, "vocab_size": 97},
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_moe_mixed": {**_QWEN3_MOE, "norm_topk_prob": False, "mlp_only_layers": [0, 2]},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        "num_nextn_predict_layers": 0,
    },
}


def configuration_of(name: str, **changes: object) -> dict[str, Any]:
    """Keys of config.json, which transformers may change in place."""
    return deepcopy({**COMMON, **VARIANTS[name], **changes})


def write_family(
    folder: Path, name: str, is_scalar: bool = False, seed: int = 5, **changes: object
) -> torch.nn.Module:
    """Saves a float32 model of a variant, with norm weights that are not 1 and biases that are not 0, and returns it.

    Args:
        name: a key of VARIANTS.
        changes: further keys of config.json.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**configuration_of(name, **changes))
    kind = AutoModelForSequenceClassification if is_scalar else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        named = [*model.named_parameters(), *model.named_buffers()]
        for tensor in (t for n, t in named if "norm" in n or n.endswith("bias")):
            tensor.add_(torch.randn_like(tensor) * 0.2)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def hugging_face_outputs(
    model: torch.nn.Module, sequences: Sequence[tuple[list[int], int]], is_scalar: bool
) -> list[Tensor]:
    """Log-probs of the next tokens, or the scalar head's value of every token, of each sequence."""
    outputs = []
    for ids, _ in sequences:
        tokens = torch.tensor([ids])
        if is_scalar:
            outputs.append(model.score(model.model(tokens).last_hidden_state)[0, :, 0])
        else:
            logp = model(tokens).logits[0, :-1].log_softmax(-1)
            outputs.append(logp.gather(1, tokens[0, 1:, None])[:, 0])
    return outputs
