"""Watches vLLM's loaders write: what was copied into the parameters must be what arrived, all of it, under its name."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from rto_megatron.weight_sync.digest import digest
from rto_megatron.weight_sync.region import Region, region_of_view

_SHOWN = 5


class Copies(TorchDispatchMode):
    """Records every `copy_` as (target, source), after it happened."""

    def __init__(self, on_copy: Callable[[Tensor, Tensor], None] | None = None) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []
        self._on_copy = on_copy or (lambda target, source: self.seen.append((target, source)))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        returned = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self._on_copy(args[0], args[1])
        return returned


@dataclass(frozen=True)
class _Loaded:
    """Where a tensor that was handed to the loader lies; it may be gone by the time that something else lies there."""

    name: str
    shape: tuple[int, ...]
    start: int
    end: int
    first: int
    storage: StorageWeakRef

    @staticmethod
    def of(name: str, tensor: Tensor) -> "_Loaded":
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        storage = StorageWeakRef(tensor.untyped_storage())
        return _Loaded(name, tuple(tensor.shape), start, end, tensor.storage_offset(), storage)


class Landing:
    """Compares what vLLM's loaders write with what must be written, at the moment they write it.

    Args:
        expected: tensor name -> box -> digest of what arrived for it, int64 [].
        needs: tensor name -> the boxes that must be written, each as often as listed.
    """

    def __init__(
        self, expected: Mapping[str, Mapping[Region, Tensor]], needs: Mapping[str, tuple[Region, ...]]
    ) -> None:
        self._expected = expected
        self._needs = needs
        self._loaded: list[_Loaded] = []
        self._landed: Counter[tuple[str, Region]] = Counter()
        self._names: list[str] = []
        self._differences: list[Tensor] = []

    def watch(self) -> Copies:
        """A context in which loaders are watched."""
        return Copies(self._compare)

    def announce(self, name: str, tensor: Tensor) -> Tensor:
        """Tells that `tensor`, contiguous, is about to be given to the loader, and returns it."""
        entry = _Loaded.of(name, tensor)
        self._loaded.insert(bisect_right(self._loaded, entry.start, key=lambda one: one.start), entry)
        return tensor

    def _compare(self, target: Tensor, source: Tensor) -> None:
        loaded = None if target.is_meta else self._owner(source)
        if loaded is None:
            return  # the reload counts numbers, or moves processed ones among its own tensors
        box = region_of_view(source, loaded.shape, loaded.first)
        of_name = self._expected.get(loaded.name, {})
        if box is None or box not in of_name:
            return  # missing in the end
        self._landed[loaded.name, box] += 1
        self._names.append(loaded.name)
        self._differences.append((digest(target) != of_name[box].to(target.device)).view(1))

    def _owner(self, source: Tensor) -> _Loaded | None:
        position = bisect_right(self._loaded, source.data_ptr(), key=lambda one: one.start) - 1
        while position >= 0 and self._loaded[position].storage.expired():
            del self._loaded[position]
            position -= 1
        if position < 0 or source.data_ptr() >= self._loaded[position].end:
            return None
        return self._loaded[position]

    def faults(self) -> str | None:
        """What is wrong with what was loaded, in words, once the load is over."""
        required = Counter((name, box) for name, boxes in self._needs.items() for box in boxes)
        missing = sorted({name for name, _ in required - self._landed})
        wrong = []
        if self._differences:
            is_wrong = torch.cat(self._differences).tolist()
            wrong = sorted({name for name, bad in zip(self._names, is_wrong, strict=True) if bad})
        words = []
        if missing:
            words.append(f"not loaded: {_some(missing)}")
        if wrong:
            words.append(f"loaded with other numbers than were sent: {_some(wrong)}")
        return "; ".join(words) or None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
