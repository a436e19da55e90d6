"""The sizes of a model: everything that decides parameter shapes and the forward pass."""

from dataclasses import dataclass, fields
from typing import Literal

from rto_megatron.models.rotation_shape import PLAIN_ROTATION, Rotation

Activation = Literal["silu", "gelu", "gelu_tanh"]
NormPlace = Literal["before", "after", "around"]


@dataclass(frozen=True)
class GroupedRouting:
    """DeepSeek-V3's router: sigmoid scores, a bias per expert for the choice alone, experts chosen by group.

    Example:
        GroupedRouting(num_groups=8, groups_per_token=4, scale=2.5)
    """

    num_groups: int
    groups_per_token: int
    scale: float


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward part of some layers.

    Example:
        Experts(num=8, per_token=2, ffn_hidden_size=14336, layers=tuple(range(32)), is_normalized=True)
    """

    num: int
    per_token: int
    ffn_hidden_size: int  # of one expert
    layers: tuple[int, ...]  # those that have experts; the others are dense
    is_normalized: bool  # the probabilities of the chosen experts sum to 1
    shared_ffn_hidden_size: int | None = None  # of the expert that every token passes
    has_shared_gate: bool = False
    routing: GroupedRouting | None = None  # null: softmax over all experts


@dataclass(frozen=True)
class LatentAttention:
    """DeepSeek's multi-head latent attention: ranks of the compressions and dimensions of one head.

    Example:
        LatentAttention(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    """

    q_rank: int | None  # null: queries are not compressed
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True)
class ModelShape:
    """What config.json says about a decoder with RMSNorm and a gated feed-forward network.

    Example:
        ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, 1e-5, 5e5, None, False, 0.02)
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling_factor: float | None  # Llama-3.1 scaling; null: none
    is_tied: bool  # the output projection is the embedding
    init_std: float
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    experts: Experts | None = None
    latent: LatentAttention | None = None
    activation: Activation = "silu"  # of the feed-forward gate
    window: int | None = None  # tokens that attention sees, the own one included; null: all before
    windowed_layers: tuple[int, ...] = ()  # those with the window; none: every layer, if there is a window
    embedding_scale: float = 1.0  # of the token embeddings, before the first layer
    rotation: Rotation = PLAIN_ROTATION
    norms: NormPlace = "before"  # attention and feed-forward network, inside the residual connection
    has_shifted_norms: bool = False  # they multiply by 1 + weight
    has_whole_qk_norm: bool = False  # one norm over all heads of q, and one over those of k
    residual_scale: float = 1.0  # of what attention and feed-forward network add
    score_scale: float | None = None  # of attention scores; null: 1 / sqrt(head_dim)
    score_softcap: float | None = None  # largest magnitude of attention scores, by tanh; null: none
    logit_divisor: float = 1.0  # of a language model's logits
    logit_softcap: float | None = None  # their largest magnitude; null: none

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same parameters."""
        return self.experts is None or len(self.experts.layers) in (0, self.num_layers)

    @property
    def num_norms(self) -> int:
        """Norms over the hidden size in one layer."""
        return 4 if self.norms == "around" else 2

    @property
    def own_parts(self) -> dict[str, object]:
        """What is not as in Llama's decoder, nor a bias, a norm of heads or a mixture: name -> value."""
        return {
            part.name: getattr(self, part.name)
            for part in fields(self)
            if part.name in _OWN_PARTS and getattr(self, part.name) != part.default
        }


_OWN_PARTS = frozenset(
    {"activation", "window", "windowed_layers", "embedding_scale", "rotation", "norms", "has_shifted_norms"}
    | {
        "has_whole_qk_norm",
        "residual_scale",
        "score_scale",
        "score_softcap",
        "logit_divisor",
        "logit_softcap",
    }
)
