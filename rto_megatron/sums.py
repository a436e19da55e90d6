"""Sums for the logs: scalars that stay on their device until they are read, all with one transfer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

type Sums = Mapping[str, tuple[Tensor, Tensor]]  # name -> (sum, count), scalars of one device


def detached(sums: Sums) -> Sums:
    """The same numbers without what they were computed from."""
    return {name: (total.detach(), count.detach()) for name, (total, count) in sums.items()}


def read_sums(parts: Sequence[Sums]) -> list[dict[str, tuple[float, float]]]:
    """Every part as Python floats; the host waits for the device once, and not at all where nothing is to be read."""
    scalars = [scalar.detach().double() for sums in parts for pair in sums.values() for scalar in pair]
    values = iter(torch.stack(scalars).tolist() if scalars else [])
    return [{name: (next(values), next(values)) for name in sums} for sums in parts]


def to_metrics(sums: Sums) -> dict[str, tuple[float, float]]:
    """Sums and counts as Python floats, with one transfer from the device for all of them."""
    return read_sums([sums])[0]
