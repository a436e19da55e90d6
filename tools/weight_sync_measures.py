"""What `benchmark_weight_sync.py` measures on both ends of a push: raw broadcasts, seconds by part, memory, limits."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType

import torch

from rto_megatron.weight_sync.manifest import Manifest, digest
from rto_megatron.weight_sync.sender import broadcast_each
from rto_megatron.weight_sync.transport import Communicator

_LIMIT_BYTES = 256 << 20


class _Running(threading.local):
    """The parts that a thread is in, the innermost last, and when it came there."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.since = 0.0


class PartClock:
    """Seconds that this process spends in some functions, from now on.

    What runs within a function that is timed itself counts as the inner one's alone; threads are counted together.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._running = _Running()

    def time(self, owner: ModuleType | type, name: str, part: str) -> None:
        """Counts every call of `owner.name` as `part`."""
        inner: Callable[..., object] = getattr(owner, name)

        @wraps(inner)
        def timed(*given: object, **named: object) -> object:
            self._switch()
            self._running.parts.append(part)
            try:
                return inner(*given, **named)
            finally:
                self._switch()
                self._running.parts.pop()

        setattr(owner, name, timed)

    def _switch(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, running = time.monotonic(), self._running
        if running.parts:
            with self._lock:
                part = running.parts[-1]
                self._seconds[part] = self._seconds.get(part, 0.0) + now - running.since
        running.since = now

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        with self._lock:
            seconds, self._seconds = self._seconds, {}
        return seconds


@dataclass(frozen=True)
class OwnShare:
    """What a push took of one process: seconds by part, of all its threads on a core, and bytes of peak memory."""

    parts: dict[str, float]
    cpu_s: float
    peak_bytes: int

    def to_json(self) -> str:
        """Text for the other processes."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "OwnShare":
        """Reads `to_json`."""
        return OwnShare(**json.loads(text))


class Meter:
    """Measures what one push takes of this process, from the moment when it is made."""

    def __init__(self, clock: PartClock) -> None:
        clock.take()
        self._clock = clock
        self._memory = PeakMemory()
        self._cpu_s = time.process_time()

    def read(self) -> OwnShare:
        """Until now."""
        return OwnShare(self._clock.take(), time.process_time() - self._cpu_s, self._memory.above())


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


def limits() -> dict[str, float]:
    """Seconds per GB of what a push over loopback is made of, on one thread of this process's host memory."""
    source = torch.ones(_LIMIT_BYTES, dtype=torch.uint8)
    touched = source.clone()
    words = source.view(torch.int64)
    return {
        "copy into fresh pages": _seconds_per_gb(source.clone),
        "copy into touched pages": _seconds_per_gb(lambda: touched.copy_(source)),
        "read": _seconds_per_gb(words.sum),
        "digest": _seconds_per_gb(lambda: digest(source)),
    }


def _seconds_per_gb(work: Callable[[], object]) -> float:
    return min(_seconds(work) for _ in range(3)) / (_LIMIT_BYTES / 1e9)


def _seconds(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun
