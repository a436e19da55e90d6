"""What a stage checks before its ranks meet, and where the trainer and the pool meet."""

import socket
from pathlib import Path

import pytest

from rto_megatron.errors import MachineError
from rto_megatron.trainer.connected_pool import meeting_host
from rto_megatron.trainer.stages import _refuse_lone_task


def test_srun_without_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    with pytest.raises(MachineError, match="SLURM started 8 tasks without RANK"):
        _refuse_lone_task()
    monkeypatch.setenv("RANK", "0")
    _refuse_lone_task()


def test_local_servers_are_met_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert meeting_host(["http://127.0.0.1:8000", "http://localhost:8001"]) == "127.0.0.1"


@pytest.mark.skipif(not Path("/proc/net/route").exists(), reason="needs Linux's routing table")
def test_a_server_elsewhere_is_met_at_the_address_of_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    if "00000000" not in [line.split()[1] for line in Path("/proc/net/route").read_text().splitlines()[1:]]:
        pytest.skip("this machine has no route to others")
    host = meeting_host(["http://127.0.0.1:8000", "http://192.0.2.7:8000"])
    assert socket.inet_aton(host) and not host.startswith("127.")
