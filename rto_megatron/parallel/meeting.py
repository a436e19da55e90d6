"""The meeting of all ranks before their first collective: a rank that does not come is named, within a limit."""

import os
import socket
import time
import warnings
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from rto_megatron.errors import MachineError

_LIMIT_S = 600.0  # ranks of one job start minutes apart where machines read Python from one disk
_FIRST_WORD_S = 30.0
_SHORTEST_PAUSE_S = 0.001
_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_MET = "met"  # key of the count of arrivals
_AGENT_HAS_STORE = "TORCHELASTIC_USE_AGENT_STORE"


class AbsentRanks(MachineError):  # noqa: N818  (a state of the run, told like a user's error)
    """Not all ranks that the launcher announced have come."""

    reason = "INFRA_LOST_RANK"


def join_ranks(backend: Literal["nccl", "gloo"], timeout: timedelta, limit_s: float = _LIMIT_S) -> None:
    """Makes the group of all ranks that the launcher announced in the environment; all of them must call it.

    Args:
        timeout: of the group's collectives.
        limit_s: for all ranks to come.

    Raises:
        AbsentRanks: some did not, or nobody keeps the meeting point.
    """
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    store = _store(rank, limit_s)
    _wait_for_all(store, rank, size, limit_s)
    store.set_timeout(timeout)
    dist.init_process_group(
        backend, store=dist.PrefixStore("ranks", store), rank=rank, world_size=size, timeout=timeout
    )


def await_all(size: int) -> None:
    """Returns once all ranks have called it as often as this one, or the time limit of their collectives is over."""
    store = _get_default_store()
    deadline = time.monotonic() + store.timeout.total_seconds()  # type: ignore[attr-defined]  # the stub lacks it
    # Nobody comes a second time before all have come once, so the count alone tells the round.
    num_wanted = -(-store.add(_MET, 1) // size) * size
    pause_s = _SHORTEST_PAUSE_S
    while store.add(_MET, 0) < num_wanted and time.monotonic() < deadline:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _PAUSE_S)


def _store(rank: int, limit_s: float) -> dist.TCPStore:
    is_host = rank == 0 and os.environ.get(_AGENT_HAS_STORE) != str(True)
    try:
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=is_host,
            timeout=timedelta(seconds=limit_s),
            wait_for_workers=False,
            multi_tenant=is_host,
        )
    except dist.DistError as error:
        # A torch error names its place in C++ after the first line.
        raise AbsentRanks(
            f"rank {rank} on {socket.gethostname()} has no meeting point at {_place()} ({str(error).splitlines()[0]}); "
            "start all ranks with one MASTER_ADDR and MASTER_PORT that every machine reaches (rto doctor, under the "
            "same launcher, tells why one does not)"
        ) from error


def _wait_for_all(store: dist.TCPStore, rank: int, size: int, limit_s: float) -> None:
    keys = {one: f"here/{one}" for one in range(size)}
    store.set(keys[rank], socket.gethostname())
    started, pause_s, is_quiet = time.monotonic(), _PAUSE_S, True
    while not store.check(list(keys.values())):
        waited = time.monotonic() - started
        if waited > limit_s:
            raise AbsentRanks(
                f"{_absent(store, keys)} did not come to {_place()} within {limit_s:.0f} s; start all of them, or name "
                "the number that you start (WORLD_SIZE, torchrun --nnodes and --nproc-per-node)"
            )
        if is_quiet and rank == 0 and waited > _FIRST_WORD_S:
            is_quiet = False
            warnings.warn(
                f"waiting for {_absent(store, keys)}, up to {limit_s:.0f} s",
                stacklevel=2,
                category=UserWarning,
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _absent(store: dist.TCPStore, keys: dict[int, str]) -> str:
    ranks = [str(one) for one, key in keys.items() if not store.check([key])]
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(ranks)} of {len(keys)}"


def _place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
