"""Boxes within a tensor: the run that a sender holds, the part that a worker's shard needs, and where they meet."""

import math
from dataclasses import dataclass
from operator import add

from torch import Tensor

from rto_megatron.weight_sync.manifest import PieceSpec


@dataclass(frozen=True)
class Region:
    """A box of a tensor: per dimension, where it starts and how long it is."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def of(self, tensor: Tensor, origin: tuple[int, ...] | None = None) -> Tensor:
        """The box as a view of `tensor`, whose first element is at `origin` of the box's coordinates."""
        for dim, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            tensor = tensor.narrow(dim, start - (origin[dim] if origin else 0), size)
        return tensor

    def meet(self, other: "Region") -> "Region | None":
        """The common box, None where there is none."""
        starts = tuple(map(max, self.starts, other.starts))
        ends = tuple(map(min, self._ends(), other._ends()))
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Region(starts, sizes) if all(size > 0 for size in sizes) else None

    def _ends(self) -> tuple[int, ...]:
        return tuple(map(add, self.starts, self.sizes))


def whole(shape: tuple[int, ...]) -> Region:
    """All of a tensor."""
    return Region((0,) * len(shape), shape)


def piece_region(spec: PieceSpec) -> Region:
    """Where a sender's piece lies in its tensor."""
    starts = [0] * len(spec.shape)
    if starts:
        starts[spec.dim] = spec.start
    return Region(tuple(starts), spec.size)


def region_of_view(view: Tensor, shape: tuple[int, ...], first: int = 0) -> Region | None:
    """The box of a contiguous tensor that a view of it shows; None where it shows something else than a box.

    Args:
        view: shares the tensor's storage, dimensions in the same order.
        shape: of the tensor.
        first: storage offset of the tensor, in elements.
    """
    strides = _contiguous_strides(shape)
    offset = view.storage_offset() - first
    starts = []
    for stride in strides:
        starts.append(offset // stride)
        offset %= stride
    box = Region(tuple(starts), tuple(view.shape))
    if len(shape) != view.dim():
        # A loader may flatten a whole tensor, never a part of one.
        is_all = view.is_contiguous() and view.numel() == math.prod(shape) and not any(starts)
        return whole(shape) if is_all else None
    steps = zip(view.shape, view.stride(), strides, strict=True)
    return box if all(size == 1 or step == stride for size, step, stride in steps) else None


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, stride = [], 1
    for length in reversed(shape):
        strides.append(stride)
        stride *= max(1, length)
    return tuple(reversed(strides))
