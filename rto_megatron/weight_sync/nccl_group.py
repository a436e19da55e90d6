"""The group of a push over NCCL: its failures are the push's, where torch would end the process for them."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch.distributed import BroadcastOptions, PrefixStore

from rto_megatron.weight_sync.control_channel import InFlight

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import ProcessGroupNCCL

_BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"  # read by each group when it is made


def nccl_group(
    store: PrefixStore, rank: int, world_size: int, timeout_s: float, device: torch.device
) -> "ProcessGroupNCCL":
    """A group of one GPU per rank, which nobody but its user watches.

    A broadcast that failed is completed, and its `wait` raises RuntimeError.
    """
    # Builds of torch without CUDA have no such name.
    from torch.distributed.distributed_c10d import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    with torch.cuda.device(device), _without_watchdog():
        return ProcessGroupNCCL(store, rank, world_size, options)


class FirstBroadcast:
    """One byte from rank 0, which makes the ranks of a group connect; all of them must begin it.

    Inside the call NCCL waits for every rank to connect, and knows no time limit there (bootstrap.cc): a rank that was
    killed meanwhile would keep the others for good. So the call has a thread, which is left behind if it does not end.

    Example:
        channel.wait_for(FirstBroadcast(group, device), source=0, deadline=channel.deadline())
    """

    def __init__(self, group: "ProcessGroupNCCL", device: torch.device) -> None:
        self._begun: Future[InFlight] = Future()
        name = "connects over NCCL"
        threading.Thread(target=self._begin, args=(group, device), name=name, daemon=True).start()

    def _begin(self, group: "ProcessGroupNCCL", device: torch.device) -> None:
        options = BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        try:
            byte = torch.zeros(1, dtype=torch.uint8, device=device)
            self._begun.set_result(group.broadcast([byte], options))  # type: ignore[attr-defined]  # the stub lacks it
        except RuntimeError as error:
            self._begun.set_exception(error)

    def is_completed(self) -> bool:
        """Whether `wait` returns at once."""
        begun = self._begun
        return begun.done() and (begun.exception() is not None or begun.result().is_completed())

    def wait(self) -> None:
        """Raises RuntimeError where the ranks could not connect."""
        self._begun.result().wait()


@contextmanager
def _without_watchdog() -> Iterator[None]:
    """Groups made inside have none.

    A lost peer or a time limit is an exception to torch's watchdog, by which it ends its process a minute later: ranks
    would die of a server that was killed during a push, and servers of a trainer.
    """
    before = os.environ.get(_BLOCKING_WAIT)
    os.environ[_BLOCKING_WAIT] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_BLOCKING_WAIT]
        else:
            os.environ[_BLOCKING_WAIT] = before
