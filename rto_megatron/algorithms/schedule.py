"""Learning-rate schedules as factors of the peak rate."""

import math
from typing import Literal


def warmup_steps(fraction: float, total: int) -> int:
    """Steps of the warm-up, ceil(fraction * total), and fewer than all: its first step has rate 0.

    A run of one step has none, and any other one reaches the peak rate.
    """
    # 0.07 * 100 is 7.000000000000001 in binary; without rounding the ceiling would be one step too many.
    return min(math.ceil(round(fraction * total, 9)), max(total - 1, 0))


def lr_factor(
    step: int, total: int, warmup: int, min_fraction: float, kind: Literal["cosine", "constant"]
) -> float:
    """Factor of the peak learning rate for the optimizer step that follows `step` finished ones.

    Linear from 0 over `warmup` steps (so the very first step of a warm-up has rate 0), then either a cosine
    that reaches `min_fraction` at `total` and stays there, or 1. `min_fraction` plays no part in "constant".

    Args:
        step: finished optimizer steps, from 0.
        total: optimizer steps of the whole run.
        warmup: steps of the warm-up; see `warmup_steps`.
        min_fraction: floor of the cosine, relative to the peak.
        kind: shape after the warm-up.

    Source: transformers, optimization.py:get_cosine_with_min_lr_schedule_with_warmup.
    """
    if step < warmup:
        return step / warmup
    if kind == "constant":
        return 1.0
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return min_fraction + (1 - min_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
