"""Where a tensor lies inside a worker's parameters: regions of a tensor, and what a loader does to one."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import add

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from rto_megatron.weight_sync.manifest import PieceSpec


@dataclass(frozen=True)
class Region:
    """A box of a tensor: per dimension, where it starts and how long it is.

    Example:
        Region(starts=(0, 2), sizes=(4, 3))  # rows 0 to 3, columns 2 to 4
    """

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


@dataclass(frozen=True)
class Place:
    """A part of a parameter.

    Args:
        parameter: full name.
        offset: of the first element from the parameter's, in elements.
        sizes: of the part.
        strides: of the part, in elements.

    Example:
        Place("lm_head.weight", offset=0, sizes=(4, 8), strides=(8, 1))
    """

    parameter: str
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(view: Tensor, name: str, parameter: Tensor) -> "Place":
        """The part that `view` shows of a parameter whose storage it shares."""
        offset = int(view.storage_offset() - parameter.storage_offset())
        return Place(name, offset, tuple(view.shape), view.stride())

    def view(self, parameter: Tensor) -> Tensor:
        """The part of `parameter`, which has the strides of the one that was asked about."""
        return parameter.as_strided(self.sizes, self.strides, parameter.storage_offset() + self.offset)


@dataclass(frozen=True)
class Written:
    """A parameter as the loader filled it; vLLM's reload drops its memory once the numbers are in their last place.

    Example:
        written.has_layout_of(tensor)
    """

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: StorageWeakRef

    def has_layout_of(self, tensor: Tensor) -> bool:
        """Whether a part of this parameter lies at the same place in `tensor`."""
        return tuple(tensor.shape) == self.shape and tensor.stride() == self.strides


class WrittenParameters:
    """The parameters of a model that are being written, by their memory.

    Example:
        WrittenParameters(model).place(target)
    """

    def __init__(self, model: nn.Module) -> None:
        self._slots = [(name, module, own) for name, module, own, _ in owned_parameters(model)]
        self._known: dict[int, tuple[int, Written]] = {}  # address -> index of the slot, parameter
        self._last = 0  # index of the slot that was found last

    def known(self, tensor: Tensor) -> Written | None:
        """The parameter that `tensor` is a part of, if a loader wrote it."""
        found = self._find(tensor.untyped_storage().data_ptr())
        return None if found is None else found[1]

    def _find(self, address: int) -> tuple[int, Written] | None:
        found = self._known.get(address)
        if found is not None and found[1].storage.expired():
            del self._known[address]
            return None
        return found

    def place(self, target: Tensor) -> Place | None:
        """The part that a loader writes, None where it is no parameter's."""
        address = target.untyped_storage().data_ptr()
        known = self._find(address)
        for index in self._from_the_last() if known is None else (known[0],):
            name, module, own = self._slots[index]
            parameter = module._parameters.get(own)
            if parameter is not None and parameter.untyped_storage().data_ptr() == address:
                if known is None:
                    storage = StorageWeakRef(parameter.untyped_storage())
                    written = Written(name, tuple(parameter.shape), parameter.stride(), storage)
                    self._known[address], self._last = (index, written), index
                return Place.of(target, name, parameter)
        return None

    def _from_the_last(self) -> Iterable[int]:
        # Loaders go through a model in its order, and a search from its start would be quadratic in its layers.
        return chain(range(self._last, len(self._slots)), range(self._last))


def owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Full name, owner, name there and value of every parameter; tied ones once for each owner."""
    for prefix, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{own}" if prefix else own, module, own, parameter
