"""What a push asks of torch's NCCL group, of which there is none without a GPU: a stand-in notes it."""

import contextlib
import os
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from torch.distributed import BroadcastOptions, HashStore, PrefixStore, distributed_c10d

from rto_megatron.weight_sync.control_channel import ControlChannel, TransportError
from rto_megatron.weight_sync.transport import NetworkWire, Rendezvous

GPU = torch.device("cuda", 0)
BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"


class Sent:
    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Group:
    """Torch's group reads its variables when it is made (ProcessGroupNCCL.cpp), and has a watchdog without this one."""

    class Options:
        _timeout = timedelta()

    def __init__(self, store: PrefixStore, rank: int, size: int, options: Options) -> None:
        self.has_watchdog = os.environ.get(BLOCKING_WAIT) != "1"
        self.timeout = options._timeout
        self.is_aborted = False
        self.sent: list[torch.Tensor] = []
        made.append(self)

    def broadcast(self, tensors: list[torch.Tensor], options: BroadcastOptions) -> Sent:
        """NCCL connects in the first call, which does not end while a rank is missing."""
        assert (options.rootRank, options.rootTensor) == (0, 0)
        all_are_there.wait()
        if reason := lost_by:
            raise RuntimeError(reason[0])
        self.sent += tensors
        return Sent()

    def abort(self) -> None:
        self.is_aborted = True
        raise RuntimeError("ProcessGroup abort timed out")


made: list[Group] = []
lost_by: list[str] = []
all_are_there = threading.Event()


@pytest.fixture
def store() -> PrefixStore:
    return PrefixStore("test", HashStore())


@pytest.fixture
def wire(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[NetworkWire]:
    made.clear()
    lost_by.clear()
    all_are_there.set()
    monkeypatch.setattr(distributed_c10d, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **how: torch.ones(shape, **how))
    meeting = Rendezvous("127.0.0.1", 29501, 1, 2, "test", timeout_s=7, device_type="cuda")
    yield NetworkWire(ControlChannel(store, rank=0, timeout_s=7), meeting, world_size=2, device=GPU)
    all_are_there.set()


@pytest.mark.parametrize("before", [None, "0"])
def test_a_lost_peer_ends_no_process(
    wire: NetworkWire, before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(BLOCKING_WAIT, raising=False)
    if before is not None:
        monkeypatch.setenv(BLOCKING_WAIT, before)
    wire.join(["", ""])
    (group,) = made
    assert not group.has_watchdog and group.timeout == timedelta(seconds=7)
    assert os.environ.get(BLOCKING_WAIT) == before  # the ranks' own groups keep theirs


def test_whoever_gives_up_frees_the_device(wire: NetworkWire) -> None:
    wire.join(["", ""])
    wire.give_up()
    assert made[0].is_aborted
    with pytest.raises(TransportError, match="given up"):
        wire.start(torch.empty(1), source=0)
    wire.give_up()


def test_a_rank_that_dies_before_all_are_connected_keeps_nobody(
    wire: NetworkWire, store: PrefixStore
) -> None:
    all_are_there.clear()  # it is killed between the rendezvous and its part of NCCL's
    ControlChannel(store, rank=1, timeout_s=7).abort("inference server 1 does not answer")
    with pytest.raises(TransportError, match="inference server 1 does not answer"):
        wire.join(["", ""])
    wire.give_up()
    assert made[0].is_aborted


def test_ranks_that_do_not_connect_are_not_waited_for_beyond_the_time_limit(
    wire: NetworkWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_are_there.clear()
    monkeypatch.setattr(wire._channel, "timeout_s", 0.01)
    with pytest.raises(TransportError, match="did not end"):
        wire.join(["", ""])


def test_what_nccl_says_of_ranks_that_cannot_connect_is_raised(wire: NetworkWire) -> None:
    lost_by.append("NCCL error: remote process exited or there was a network error")
    with pytest.raises(RuntimeError, match="remote process exited"):
        wire.join(["", ""])
