"""How positions rotate heads, beyond the base that every family has."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Yarn:
    """A context stretched by a factor, frequency by frequency (arXiv 2309.00071, section 3).

    Example:
        Yarn(factor=4.0, original_positions=32768)
    """

    factor: float
    original_positions: int  # of pretraining
    beta_fast: float = 32.0  # frequencies that turn more often in the original positions stay as they are
    beta_slow: float = 1.0  # those that turn less often are divided by the factor

    @property
    def amplitude(self) -> float:
        """By which rotated queries and keys are multiplied."""
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class LongRope:
    """Phi's long contexts: every frequency is divided by a factor of its own (arXiv 2402.13753, section 3.2).

    There is a set of factors for texts within the positions of pretraining, which is the one that is used here, and one
    for longer texts.

    Example:
        LongRope((1.0, 1.1), (1.0, 32.0), original_positions=4096, positions=131072)
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_positions: int  # of pretraining
    positions: int  # max_position_embeddings

    @property
    def amplitude(self) -> float:
        """By which the rotated numbers of queries and keys are multiplied, with both sets."""
        stretch = self.positions / self.original_positions
        return math.sqrt(1 + math.log(stretch) / math.log(self.original_positions)) if stretch > 1 else 1.0


@dataclass(frozen=True)
class Rotation:
    """Which heads and which of their numbers rotate, and what is done to the angles.

    Example:
        Rotation(unrotated_layers=(3, 7))
    """

    share: float = 1.0  # of a head's numbers, the first ones
    # Pairs are neighbours; else a number and the one half a rotated part behind it.
    is_interleaved: bool = False
    unrotated_layers: tuple[int, ...] = ()
    windowed_theta: float | None = None  # the base in layers with a window; null: the others'
    divisor: float = 1.0  # of positions; layers with a base of their own have none
    yarn: Yarn | None = None
    longrope: LongRope | None = None

    @property
    def has_own_angles(self) -> bool:
        """Whether some angles are others than Megatron's rotary embedding computes from base and share."""
        is_stretched = self.yarn is not None or self.longrope is not None or self.divisor != 1
        return is_stretched or self.windowed_theta is not None


PLAIN_ROTATION = Rotation()
