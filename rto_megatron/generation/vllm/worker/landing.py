"""Watches vLLM's loaders write: what was copied into the parameters must be what arrived, all of it, under its name."""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rto_megatron.generation.vllm.worker.regions import Place, Region, WrittenParameters, region_of_view
from rto_megatron.weight_sync.manifest import digest

_SHOWN = 5
_UNREAD_BYTES = 64 << 20  # what waits to be read back is memory that the loader cannot use again
_SMALL_BYTES = 256 << 10  # read at once: waking another thread takes longer


class Copies(TorchDispatchMode):
    """Records every `copy_` as (target, source), after it happened.

    Args:
        on_copy: told of each; None keeps them in `seen`.
        before_change: told of what is about to write: whether it is a `copy_`, and the tensors that it is given.

    Example:
        with Copies(print): model.load_weights(tensors)
    """

    def __init__(
        self,
        on_copy: Callable[[Tensor, Tensor], None] | None = None,
        before_change: Callable[[bool, Sequence[Tensor]], None] = lambda is_copy, tensors: None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch left it so
        self.seen: list[tuple[Tensor, Tensor]] = []
        self._on_copy = on_copy or (lambda target, source: self.seen.append((target, source)))
        self._before_change = before_change

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        is_copy = func is torch.ops.aten.copy_.default
        if func._schema.is_mutable:
            given = tree_leaves((args, kwargs))
            self._before_change(is_copy, [one for one in given if isinstance(one, Tensor)])
        returned: object = func(*args, **(kwargs or {}))
        if is_copy:
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
        return _Loaded(name, tuple(tensor.shape), start, end, int(tensor.storage_offset()), storage)


class Landing:
    """Compares what vLLM's loaders write with what must be written, when they write it and once more at the end.

    The second look sees the parameters that keep their layout; what a kernel has repacked is beyond it.

    Args:
        model: about to be loaded.
        expected: tensor name -> box -> digest of what arrived for it, int64 [].
        places: tensor name -> every box that must be written, and where.

    Example:
        with landing.watch(): model.load_weights(tensors)
        problems = landing.faults()
    """

    def __init__(
        self,
        model: nn.Module,
        expected: Mapping[str, Mapping[Region, Tensor]],
        places: Mapping[str, tuple[tuple[Region, Place], ...]],
    ) -> None:
        self._model = model
        self._expected = expected
        self._required = {(name, box, place) for name, pairs in places.items() for box, place in pairs}
        self._loaded: list[_Loaded] = []
        self._parameters = WrittenParameters(model)
        self._landed: set[tuple[str, Region, Place]] = set()
        self._kept: dict[str, int] = {}  # parameter -> address that it was moved to as the loader filled it
        self._repacked: set[str] = set()
        self._landings = _Comparisons()
        self._unread = _Unread(self._landings)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """A context in which loaders are watched."""
        with self._unread.beside(), Copies(self._compare, self._before_change):
            yield

    def announce(self, name: str, tensor: Tensor) -> Tensor:
        """Tells that `tensor`, contiguous, is about to be given to the loader, and returns it."""
        entry = _Loaded.of(name, tensor)
        self._loaded.insert(bisect_right(self._loaded, entry.start, key=lambda one: one.start), entry)
        return tensor

    def _before_change(self, is_copy: bool, tensors: Sequence[Tensor]) -> None:
        # One part of a parameter after the other is loaded; anything else may change what was.
        if not is_copy or self._owner(tensors[1]) is None:
            self._unread.read(tensors)

    def _compare(self, target: Tensor, source: Tensor) -> None:
        if target.is_meta:
            return  # the reload counts numbers
        loaded = self._owner(source)
        if loaded is None:
            self._note_other(target, source)
            return
        box = region_of_view(source, loaded.shape, loaded.first)
        of_name = self._expected.get(loaded.name, {})
        place = self._parameters.place(target)
        if box is None or box not in of_name or place is None:
            return  # missing in the end
        self._landed.add((loaded.name, box, place))
        self._unread.add(loaded.name, target, of_name[box])

    def _note_other(self, target: Tensor, source: Tensor) -> None:
        moved, hit = self._parameters.known(source), self._parameters.known(target)
        if moved is not None and moved.has_layout_of(source) and moved.has_layout_of(target):
            self._kept[moved.name] = target.untyped_storage().data_ptr()
        elif hit is not None:
            self._repacked.add(hit.name)  # in place, as kernels for experts are fed

    def _owner(self, source: Tensor) -> _Loaded | None:
        position = bisect_right(self._loaded, source.data_ptr(), key=lambda one: one.start) - 1
        while position >= 0 and self._loaded[position].storage.expired():
            del self._loaded[position]
            position -= 1
        if position < 0 or source.data_ptr() >= self._loaded[position].end:
            return None
        return self._loaded[position]

    def faults(self) -> str | None:
        """What is wrong with the model, in words, once the load is over."""
        missing = self._required - self._landed
        strayed = {name for name, _, _ in self._landed - self._required}
        words = {
            "not loaded": {name for name, _, _ in missing} - strayed,
            "loaded into the place of another": strayed,
            "loaded with other numbers than were sent": self._landings.differing(),
            "changed after it was loaded": self._changed(),
        }
        return "; ".join(f"{what}: {_some(sorted(names))}" for what, names in words.items() if names) or None

    def _changed(self) -> set[str]:
        final = {
            name: parameter.detach()
            for name, parameter in self._model.named_parameters(remove_duplicate=False)
            if name not in self._repacked and self._kept.get(name) == parameter.untyped_storage().data_ptr()
        }
        comparisons = _Comparisons()
        for name, box, place in self._landed:
            if place.parameter in final:
                comparisons.add(name, place.view(final[place.parameter]), self._expected[name][box])
        return comparisons.differing()


class _Comparisons:
    """Digests that should be equal, read back together: one synchronisation with a device."""

    def __init__(self) -> None:
        self._differences: list[tuple[str, Tensor]] = []

    def add(self, name: str, found: Tensor, expected: Tensor) -> None:
        self._differences.append((name, (digest(found) != expected.to(found.device)).view(1)))

    def differing(self) -> set[str]:
        """Names that differ."""
        if not self._differences:
            return set()
        is_wrong = torch.cat([difference for _, difference in self._differences]).tolist()
        return {name for (name, _), bad in zip(self._differences, is_wrong, strict=True) if bad}


class _Unread:
    """What was loaded into host memory and is yet to be read back, by a thread beside the one that loads.

    A load keeps one core busy while the trainer waits for it. On a device the stream does the same.
    """

    def __init__(self, comparisons: _Comparisons) -> None:
        self._comparisons = comparisons
        self._thread: ThreadPoolExecutor | None = None
        self._running: deque[tuple[Tensor, Future[None]]] = deque()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Reads meanwhile, and has read all afterwards."""
        with ThreadPoolExecutor(1, thread_name_prefix="read-back") as self._thread:
            yield
            self._read_down_to(0)

    def add(self, name: str, found: Tensor, expected: Tensor) -> None:
        if found.device.type != "cpu" or found.nbytes < _SMALL_BYTES:
            self._comparisons.add(name, found, expected)
            return
        assert self._thread is not None
        self._running.append((found, self._thread.submit(self._compare, name, found.detach(), expected)))
        self._read_down_to(_UNREAD_BYTES)

    def _compare(self, name: str, found: Tensor, expected: Tensor) -> None:
        with torch.inference_mode():  # each thread has its own, and vLLM's has it on
            self._comparisons.add(name, found, expected)

    def read(self, tensors: Sequence[Tensor]) -> None:
        """Waits until nothing is unread that lies in the memory of one of these."""
        memories = {tensor.untyped_storage().data_ptr() for tensor in tensors if not tensor.is_meta}
        if any(found.untyped_storage().data_ptr() in memories for found, _ in self._running):
            self._read_down_to(0)

    def _read_down_to(self, num_bytes: int) -> None:
        while sum(found.nbytes for found, _ in self._running) > num_bytes:
            self._running.popleft()[1].result()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
