"""How much a pass over a mixture reads of each of its parts, and in which order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Portion:
    """What a pass over a mixture takes of one of its parts.

    Example:
        Portion(num_items=1000, weight=0.5).per_pass == 500
    """

    num_items: int
    weight: float  # how often a pass reads each item

    @property
    def per_pass(self) -> int:
        """Items that a pass reads of it, at least one of a part that has any."""
        return max(round(self.num_items * self.weight), min(self.num_items, 1))


def pass_order(portions: Sequence[Portion], seed: int, epoch: int) -> list[int]:
    """The items of pass `epoch`, by their numbers; a mixture of one part at weight 1 is a shuffle of its items."""
    order: list[int] = []
    first = 0
    for number, portion in enumerate(portions):
        if len(portions) == 1 and portion.weight == 1:
            order = list(range(portion.num_items))
        else:
            taken = _stretch(portion, f"{seed}/part {number}", epoch)
            order += [first + item for item in taken]
        first += portion.num_items
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _stretch(portion: Portion, seed: str, epoch: int) -> list[int]:
    """The items of one part that a pass reads: a stretch of one shuffle of it after another."""
    begin, end = epoch * portion.per_pass, (epoch + 1) * portion.per_pass
    size = max(portion.num_items, 1)
    taken: list[int] = []
    for lap in range(begin // size, -(-end // size)):
        shuffled = list(range(portion.num_items))
        random.Random(f"{seed}/{lap}").shuffle(shuffled)
        taken += shuffled[max(begin - lap * size, 0) : max(end - lap * size, 0)]
    return taken
