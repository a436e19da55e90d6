"""A small model shape that TP 1, 2 and 4 can cut."""

from rto_megatron.models.shape import ModelShape

SHAPE = ModelShape(
    family="llama",
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_heads=8,
    num_kv_heads=4,
    head_dim=2,
    vocab_size=13,
    max_positions=32,
    norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling_factor=None,
    is_tied=False,
    init_std=0.02,
)
