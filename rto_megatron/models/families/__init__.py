"""The model families by their model_type. To add one: a file here and a line below."""

from rto_megatron.models.families import (
    deepseek_v3,
    gemma2,
    gemma3_text,
    glm4,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
)

FAMILIES = {
    "deepseek_v3": deepseek_v3.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3_text.FAMILY,
    "glm4": glm4.FAMILY,
    "granite": granite.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmo2": olmo2.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "seed_oss": seed_oss.FAMILY,
    "smollm3": smollm3.FAMILY,
}

REFUSED = {
    "gemma": "of Gemma, 2 and the text models of 3 (model_type gemma2, gemma3_text) are read here, and 1 is not",
    "gemma3": "it has a vision tower, and models here read text alone; save the language model inside by itself "
    "(transformers' Gemma3ForCausalLM, model_type gemma3_text) and name that folder",
}
