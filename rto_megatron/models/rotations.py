"""The angles by which positions rotate heads, where they are not Megatron's own: stretched, or by kind of layer."""

import math

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from rto_megatron.models.rotation_shape import Yarn
from rto_megatron.models.shape import ModelShape


class Rotations(RotaryEmbedding):  # type: ignore[misc]  # megatron-core has no types
    """Angles of every position: [s, 1, 1, d], or [s, 2, 1, d] with those of layers with a window second.

    Example:
        model.rotary_pos_emb = Rotations(shape, config, group)
    """

    def __init__(self, shape: ModelShape, config: TransformerConfig, group: dist.ProcessGroup) -> None:
        rotation = shape.rotation

        def make(theta: float) -> RotaryEmbedding:
            return RotaryEmbedding(*_sizes(shape, theta), use_cpu_initialization=True, cp_group=group)

        self.inv_freq: Tensor
        super().__init__(*_sizes(shape, shape.rope_theta), use_cpu_initialization=True, cp_group=group)
        if rotation.yarn is not None:
            self.inv_freq = yarn_frequencies(self.inv_freq, rotation.yarn, shape.rope_theta)
        if rotation.longrope is not None:
            self.inv_freq = self.inv_freq / torch.tensor(rotation.longrope.short_factors)
        if rotation.divisor != 1:
            self.inv_freq = self.inv_freq / rotation.divisor
        self.windowed = None if rotation.windowed_theta is None else make(rotation.windowed_theta)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Called by `forward`, which keeps what it gives."""
        angles: Tensor = super().get_emb(max_seq_len, offset)
        if self.windowed is None:
            return angles
        return torch.cat([angles, self.windowed.get_emb(max_seq_len, offset)], dim=1)


def _sizes(shape: ModelShape, theta: float) -> tuple[int, float, bool, None, float]:
    """The first arguments of Megatron's constructor."""
    return shape.head_dim, shape.rotation.share, shape.rotation.is_interleaved, None, theta


def yarn_frequencies(plain: Tensor, yarn: Yarn, theta: float) -> Tensor:
    """Frequencies stretched where they turn seldom in the original context, with a ramp between.

    Args:
        plain: [d / 2], theta ** (-2 i / d).

    Source: arXiv 2309.00071, eq. 17 to 23, with the bounds of the ramp rounded outwards as transformers does.
    """
    size = 2 * len(plain)

    def index_of(turns: float) -> float:
        """The (fractional) index of the frequency that turns so often in the original context."""
        return size * math.log(yarn.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index_of(yarn.beta_fast)), 0)
    high = min(math.ceil(index_of(yarn.beta_slow)), size - 1)
    ramp = ((torch.arange(len(plain), device=plain.device) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / yarn.factor * ramp
