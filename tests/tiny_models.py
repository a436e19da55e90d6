"""Tiny random Llama folders in Hugging Face format: the oracle of the Megatron models."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

SEQUENCES = [
    (list(range(3, 20)), 5),
    (list(range(40, 52)), 3),
    (list(range(7, 30)), 9),
    ([5, 9, 2, 11, 60, 1], 2),
]


def llama_config(vocab_size: int = 96, is_tied: bool = False) -> LlamaConfig:
    """Four layers, four heads of 32, two key-value groups."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-6,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=is_tied,
        initializer_range=0.08,
        attn_implementation="eager",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_labels=1,
    )


def write_llama(
    folder: Path, seed: int = 7, vocab_size: int = 96, is_tied: bool = False, is_scalar: bool = False
) -> torch.nn.Module:
    """Saves a float32 model whose norm weights are not 1, and returns it."""
    torch.manual_seed(seed)
    kind = LlamaForSequenceClassification if is_scalar else LlamaForCausalLM
    model = kind(llama_config(vocab_size, is_tied)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model
