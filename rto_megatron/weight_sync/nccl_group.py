"""The group of a push over NCCL: its failures are the push's, where torch would end the process for them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch.distributed import PrefixStore

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import ProcessGroupNCCL

_BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"  # read by each group when it is made


def nccl_group(
    store: PrefixStore, rank: int, world_size: int, timeout_s: float, device: torch.device
) -> "ProcessGroupNCCL":
    """A group of one GPU per rank, which nobody but its user watches.

    A broadcast that failed is completed, and its `wait` raises RuntimeError.
    """
    from torch.distributed.distributed_c10d import (
        ProcessGroupNCCL,
    )  # torch builds without CUDA have no such name

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    with torch.cuda.device(device), _without_watchdog():
        return ProcessGroupNCCL(store, rank, world_size, options)


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
