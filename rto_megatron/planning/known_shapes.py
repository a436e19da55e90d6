"""Embedded shapes of models that recipes name, for plans on machines that do not have them."""

import re
from dataclasses import replace

from rto_megatron.models.rotation_shape import Rotation
from rto_megatron.models.shape import Experts, ModelShape


def _llama(layers: int, hidden: int, ffn: int, heads: int, head_dim: int, version: str) -> ModelShape:
    return ModelShape(
        family="llama",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        vocab_size=128256,
        max_positions=8192 if version == "3" else 131072,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling_factor={"3": None, "3.1": 8.0, "3.2": 32.0}[version],
        is_tied=version == "3.2",
        init_std=0.02,
    )


_QWEN3_30B_A3B = ModelShape(
    family="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=151936,
    max_positions=40960,
    norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling_factor=None,
    is_tied=False,
    init_std=0.02,
    has_qk_norm=True,
    experts=Experts(num=128, per_token=8, ffn_hidden_size=768, layers=tuple(range(48)), is_normalized=True),
)

_QWEN3_1_7B = ModelShape(
    family="qwen3",
    num_layers=28,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_positions=40960,
    norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling_factor=None,
    is_tied=True,
    init_std=0.02,
    has_qk_norm=True,
)

_SMOLLM3_3B = ModelShape(
    family="smollm3",
    num_layers=36,
    hidden_size=2048,
    ffn_hidden_size=11008,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=128256,
    max_positions=65536,
    norm_eps=1e-6,
    rope_theta=5e6,
    rope_scaling_factor=None,
    is_tied=True,
    init_std=0.02,
    rotation=Rotation(unrotated_layers=tuple(range(3, 36, 4))),
)

_OLMO2_7B = ModelShape(
    family="olmo2",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=100352,
    max_positions=4096,
    norm_eps=1e-6,
    rope_theta=5e5,
    rope_scaling_factor=None,
    is_tied=False,
    init_std=0.02,
    norms="after",
    has_whole_qk_norm=True,
)

_GRANITE_8B = ModelShape(
    family="granite",
    num_layers=40,
    hidden_size=4096,
    ffn_hidden_size=12800,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=49155,
    max_positions=131072,
    norm_eps=1e-5,
    rope_theta=1e7,
    rope_scaling_factor=None,
    is_tied=True,
    init_std=0.02,
    embedding_scale=12.0,
    residual_scale=0.22,
    score_scale=1 / 128,
    logit_divisor=16.0,
)

_GEMMA_2_9B = ModelShape(
    family="gemma2",
    num_layers=42,
    hidden_size=3584,
    ffn_hidden_size=14336,
    num_heads=16,
    num_kv_heads=8,
    head_dim=256,
    vocab_size=256000,
    max_positions=8192,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling_factor=None,
    is_tied=True,
    init_std=0.02,
    activation="gelu_tanh",
    window=4096,
    windowed_layers=tuple(range(0, 42, 2)),
    embedding_scale=3584**0.5,
    norms="around",
    has_shifted_norms=True,
    score_scale=1 / 16,
    score_softcap=50.0,
    logit_softcap=30.0,
)

_GEMMA_3_1B = replace(
    _GEMMA_2_9B,
    family="gemma3_text",
    num_layers=26,
    hidden_size=1152,
    ffn_hidden_size=6912,
    num_heads=4,
    num_kv_heads=1,
    vocab_size=262144,
    max_positions=32768,
    rope_theta=1e6,
    has_qk_norm=True,
    window=512,
    windowed_layers=tuple(i for i in range(26) if (i + 1) % 6),
    embedding_scale=1152**0.5,
    rotation=Rotation(windowed_theta=1e4),
    score_softcap=None,
    logit_softcap=None,
)

_SEED_OSS_36B = ModelShape(
    family="seed_oss",
    num_layers=64,
    hidden_size=5120,
    ffn_hidden_size=27648,
    num_heads=80,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=155136,
    max_positions=524288,
    norm_eps=1e-6,
    rope_theta=1e7,
    rope_scaling_factor=None,
    is_tied=False,
    init_std=0.02,
    has_qkv_bias=True,
)

_GLM_4_9B = ModelShape(
    family="glm4",
    num_layers=40,
    hidden_size=4096,
    ffn_hidden_size=13696,
    num_heads=32,
    num_kv_heads=2,
    head_dim=128,
    vocab_size=151552,
    max_positions=32768,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling_factor=None,
    is_tied=False,
    init_std=0.02,
    has_qkv_bias=True,
    norms="around",
    rotation=Rotation(share=0.5, is_interleaved=True),
)

_PHI_4 = ModelShape(
    family="phi3",
    num_layers=40,
    hidden_size=5120,
    ffn_hidden_size=17920,
    num_heads=40,
    num_kv_heads=10,
    head_dim=128,
    vocab_size=100352,
    max_positions=16384,
    norm_eps=1e-5,
    rope_theta=250000.0,
    rope_scaling_factor=None,
    is_tied=False,
    init_std=0.02,
)

# Its longrope has factors that come with the model, and change nothing that a plan counts.
_PHI_4_MINI = replace(
    _PHI_4,
    num_layers=32,
    hidden_size=3072,
    ffn_hidden_size=8192,
    num_heads=24,
    num_kv_heads=8,
    vocab_size=200064,
    max_positions=4096,
    rope_theta=10000.0,
    is_tied=True,
    rotation=Rotation(share=0.75),
)

KNOWN_SHAPES = {
    "llama-3-8b": _llama(32, 4096, 14336, 32, 128, "3"),
    "llama-3-70b": _llama(80, 8192, 28672, 64, 128, "3"),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32, 128, "3.1"),
    "llama-3.1-70b": _llama(80, 8192, 28672, 64, 128, "3.1"),
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, 64, "3.2"),
    "llama-3.2-3b": _llama(28, 3072, 8192, 24, 128, "3.2"),
    "qwen3-1.7b": _QWEN3_1_7B,
    "qwen3-30b-a3b": _QWEN3_30B_A3B,
    "smollm3-3b": _SMOLLM3_3B,
    "olmo-2-7b": _OLMO2_7B,
    "granite-3.1-8b": _GRANITE_8B,
    "gemma-2-9b": _GEMMA_2_9B,
    "gemma-3-1b": _GEMMA_3_1B,
    "glm-4-9b": _GLM_4_9B,
    "seed-oss-36b": _SEED_OSS_36B,
    "phi-4": _PHI_4,
    "phi-4-mini": _PHI_4_MINI,
}
# What the names of folders of a known shape look like, in lower case.
_SPELLINGS = {
    "qwen3-1.7b": r"qwen3[-_]1\.7b",
    "qwen3-30b-a3b": r"qwen3[-_]30b[-_]a3b",
    "smollm3-3b": r"smollm3[-_]3b",
    "olmo-2-7b": r"olmo-?2-(1124-)?7b",
    "granite-3.1-8b": r"granite-3\.1-8b",
    "gemma-2-9b": r"gemma-2-9b",
    "gemma-3-1b": r"gemma-3-1b",
    "glm-4-9b": r"glm-4-9b-0414",
    "seed-oss-36b": r"seed-oss-36b",
    "phi-4-mini": r"phi-4-mini-instruct",
    "phi-4": r"phi-4$",
}


def shape_spoken_of(name: str) -> str | None:
    """The key in KNOWN_SHAPES that the name of a folder speaks of; None if of none."""
    name = name.lower()
    if (llama := re.search(r"llama-?(3(?:\.\d)?)-?(\d+b)", name)) is not None:
        key = f"llama-{llama[1]}-{llama[2]}"
        return key if key in KNOWN_SHAPES else None
    return next((key for key, pattern in _SPELLINGS.items() if re.search(pattern, name)), None)
