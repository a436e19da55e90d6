"""What the ranks of a communicator tell each other through the key-value store of their rendezvous."""

import time
from typing import Protocol

from torch.distributed import PrefixStore

_ABORTED = "aborted"
_POLL_S = 2e-4  # of a broadcast in flight
_SLOWEST_POLL_S = 0.02  # of the store
_ABORT_POLL_S = 0.05  # of the store during a broadcast


class TransportError(RuntimeError):
    """The communicator is lost: a peer is gone or too slow. A new one is needed."""


class SilenceError(RuntimeError):
    """A rank said nothing within the time limit."""


class InFlight(Protocol):
    """A broadcast that was begun; torch's `Work` is one.

    Example:
        if in_flight.is_completed(): in_flight.wait()
    """

    def is_completed(self) -> bool:
        """Whether `wait` returns at once."""
        ...

    def wait(self) -> object:
        """Ends it; the buffer is the caller's again."""
        ...


class ControlChannel:
    """One rank's end of the store. The store's own errors are RuntimeErrors, torch's DistStoreError among them.

    Example:
        channel.say("ready", "yes")
        channel.hear("ready", channel.deadline())
    """

    def __init__(self, store: PrefixStore, rank: int, timeout_s: float) -> None:
        self.store = store
        self.rank = rank
        self.timeout_s = timeout_s

    def deadline(self) -> float:
        """The time limit from here on, in monotonic seconds."""
        return time.monotonic() + self.timeout_s

    def say(self, key: str, text: str = "") -> None:
        """Makes `text` known to all ranks under `key`."""
        self.store.set(key, text)

    def are_said(self, keys: list[str]) -> bool:
        """Whether all keys are known."""
        return not keys or self.store.check(keys)

    def forget(self, keys: list[str]) -> None:
        """Frees keys that nobody will ask for again."""
        for key in keys:
            self.store.delete_key(key)

    def hear(self, key: str, deadline: float | None = None) -> str:
        """Waits for a key, until the time limit unless another deadline is given.

        Raises:
            TransportError: a rank has given up.
            SilenceError: nothing was said in time.
        """
        deadline = self.deadline() if deadline is None else deadline
        pause_s = _POLL_S
        while not self.store.check([key]):
            self.refuse_aborted()
            if time.monotonic() > deadline:
                raise SilenceError(f"no statement in {self.timeout_s:.0f} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _SLOWEST_POLL_S)
        return self.store.get(key).decode()

    def wait_for(self, in_flight: InFlight, source: int, deadline: float) -> None:
        """Waits for a broadcast.

        Raises:
            TransportError: a rank has given up, or nothing came in time.
        """
        next_look = time.monotonic() + _ABORT_POLL_S
        # NCCL's own wait has no time limit unless its watchdog may kill the whole process.
        while not in_flight.is_completed():
            now = time.monotonic()
            if now > deadline:
                raise TransportError(
                    f"weight transfer: the broadcast from rank {source} did not end in {self.timeout_s:.0f} s"
                )
            if now > next_look:
                self.refuse_aborted()
                next_look = now + _ABORT_POLL_S
            time.sleep(_POLL_S)
        in_flight.wait()

    def abort(self, reason: str) -> str:
        """Makes every rank that waits, or ever will, give up. Returns the first reason, which stays."""
        return self.store.compare_set(_ABORTED, "", reason).decode()

    def refuse_aborted(self) -> None:
        """Raises TransportError where a rank has given up."""
        if self.store.check([_ABORTED]):
            raise TransportError(f"weight transfer given up: {self.store.get(_ABORTED).decode()}")
