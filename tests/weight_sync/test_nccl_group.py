"""What a push asks of torch's NCCL group, of which there is none without a GPU: a stand-in notes it."""

import contextlib
import os
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore, PrefixStore, distributed_c10d

from rto_megatron.weight_sync.control_channel import ControlChannel, TransportError
from rto_megatron.weight_sync.transport import NetworkWire, Rendezvous

GPU = torch.device("cuda", 0)
BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"


class Group:
    """Torch's group reads its variables when it is made (ProcessGroupNCCL.cpp), and has a watchdog without this one."""

    class Options:
        _timeout = timedelta()

    def __init__(self, store: PrefixStore, rank: int, size: int, options: Options) -> None:
        self.has_watchdog = os.environ.get(BLOCKING_WAIT) != "1"
        self.timeout = options._timeout
        self.is_aborted = False
        made.append(self)

    def abort(self) -> None:
        self.is_aborted = True
        raise RuntimeError("ProcessGroup abort timed out")


made: list[Group] = []


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> NetworkWire:
    made.clear()
    monkeypatch.setattr(distributed_c10d, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    meeting = Rendezvous("127.0.0.1", 29501, 1, 2, "test", timeout_s=7, device_type="cuda")
    channel = ControlChannel(PrefixStore("test", HashStore()), rank=0, timeout_s=7)
    return NetworkWire(channel, meeting, world_size=2, device=GPU)


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
