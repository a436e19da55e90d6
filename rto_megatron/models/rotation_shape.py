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
class Rotation:
    """Which heads and which of their numbers rotate, and what is done to the angles.

    Example:
        Rotation(unrotated_layers=(3, 7))
    """

    share: float = 1.0  # of a head's numbers, the first ones
    is_interleaved: bool = (
        False  # pairs are neighbours; else a number and the one half a rotated part behind it
    )
    unrotated_layers: tuple[int, ...] = ()
    windowed_theta: float | None = None  # the base in layers with a window; null: the others'
    divisor: float = 1.0  # of positions; layers with a base of their own have none
    yarn: Yarn | None = None


PLAIN_ROTATION = Rotation()
