"""What fake tensors would take of a device's memory: every storage counts from its birth to its death."""

import weakref
from functools import partial

from torch import Tensor


class Ledger:
    """Counts the bytes of storages that live, and the most that lived at a time.

    Left out is what an operation takes for itself while it runs, and what an allocator rounds up or cannot join.

    Example:
        ledger.note(tensor)
        ledger.peak
    """

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self._noted: dict[int, object] = {}  # address of a storage -> what hears of its death

    def note(self, tensor: Tensor) -> None:
        """Counts the storage of a tensor, unless it is counted."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._noted:
            return
        self._noted[key] = weakref.ref(storage, partial(self._forget, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int, _: object) -> None:
        del self._noted[key]
        self.live -= size

    def restart(self) -> None:
        """Forgets the peak: the next is of what comes."""
        self.peak = self.live
