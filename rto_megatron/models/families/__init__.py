"""The model families by their model_type. To add one: a file here and a line below."""

from rto_megatron.models.families import (
    deepseek_v3,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)

FAMILIES = {
    "deepseek_v3": deepseek_v3.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "mixtral": mixtral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}

_GEMMA = (
    "megatron-core's local layers lack what Gemma needs: norms after attention and feed-forward ({norms}), norm "
    "weights that count from -1, embeddings times sqrt(hidden size), {attention}"
)
REFUSED = {
    "gemma": _GEMMA.format(norms="not in Gemma 1", attention="a GELU gate"),
    "gemma2": _GEMMA.format(
        norms="four a layer",
        attention="softcaps of attention and logits, a sliding window on every second layer",
    ),
    "gemma3_text": _GEMMA.format(
        norms="four a layer", attention="two rotary bases, sliding windows on five of six layers"
    ),
    "gemma3": _GEMMA.format(
        norms="four a layer",
        attention="two rotary bases, sliding windows on five of six layers, the vision tower",
    ),
}
