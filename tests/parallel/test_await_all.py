"""Ranks that wait for each other without a collective, as those of GPUs do while their pool samples."""

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from engine.layouts import topology
from ranks import run_ranks
from torch.distributed.distributed_c10d import _get_default_store

from rto_megatron.platform.device import Device
from rto_megatron.trainer.pool_requests import share

GPU = Device(torch.device("cuda", 0), backend="nccl")


def _rounds() -> list[float]:
    """Seconds of three rounds, in each of which another rank comes 0.3 s after the others."""
    place = replace(topology("dp2"), device=GPU)
    dist.all_gather = dist.broadcast = dist.all_reduce = None  # type: ignore[assignment]  # would be a kernel that waits
    seconds = []
    for late in range(3):
        began = time.monotonic()
        if late % 2 == place.rank:
            time.sleep(0.3)
        place.await_all()
        seconds.append(time.monotonic() - began)
    return seconds


def test_no_rank_goes_on_before_all_have_come() -> None:
    for seconds in run_ranks(2, _rounds):
        assert all(one > 0.29 for one in seconds)


def _late_answer() -> float:
    """Seconds until this rank's first collective, for which it was called, of rollouts that the other has late."""
    place = replace(topology("dp2"), device=GPU)
    if place.rank == 1:
        time.sleep(0.5)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="CUDA"):  # a tensor there is the collective's first step
        share(place, None)
    return time.monotonic() - began


def test_rollouts_are_shared_by_a_collective_once_all_have_theirs() -> None:
    first, _ = run_ranks(2, _late_answer)
    assert first > 0.45


def _over_gloo() -> bool:
    """Whether it left a word at the store, by which ranks of GPUs wait."""
    place = topology("dp2")
    place.await_all()
    return _get_default_store().check(["met"])


def test_over_gloo_nobody_waits() -> None:
    assert run_ranks(2, _over_gloo) == [False, False]
