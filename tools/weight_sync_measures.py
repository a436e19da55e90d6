"""What `benchmark_weight_sync.py` measures on both ends of a push: raw broadcasts, seconds on digests, peak memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from rto_megatron.weight_sync.manifest import Manifest
from rto_megatron.weight_sync.sender import broadcast_each
from rto_megatron.weight_sync.transport import Communicator


class DigestClock:
    """Seconds that this process spends in the digests of some modules, from now on."""

    def __init__(self, *modules: ModuleType) -> None:
        self._seconds = 0.0
        for module in modules:
            module.digest = self._timed(module.digest)

    def _timed(self, digest: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def timed(tensor: Tensor) -> Tensor:
            with self._adding(tensor.device):
                return digest(tensor)

        return timed

    @contextmanager
    def _adding(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.monotonic()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._seconds += time.monotonic() - begun

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class RawBroadcast:
    """The buckets of a push, sent as they are: no packing, no digest, nothing kept. Both ends use it.

    Args:
        manifest: names the buckets.
        communicator: joined, and used for nothing else.
    """

    def __init__(self, manifest: Manifest, communicator: Communicator) -> None:
        self._buckets = manifest.buckets()
        self._communicator = communicator
        largest = max(bucket.buffer_bytes for bucket in self._buckets)
        self._buffers = communicator.send_buffers(largest)

    def run(self) -> None:
        """Called by all ranks; two buckets are on their way at a time, as in a push."""
        windows = broadcast_each(
            self._communicator,
            self._buckets,
            lambda number, bucket: self._buffers[number % 2][: bucket.buffer_bytes],
        )
        for _ in windows:
            pass


class PeakMemory:
    """Resident memory of this process on the host, in bytes, above that of the moment when it is made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self._before = _status_bytes("VmRSS")

    def above(self) -> int:
        """The highest so far."""
        return max(0, _status_bytes("VmHWM") - self._before)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
