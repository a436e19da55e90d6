"""Meeting points listen on the address that they are given, and on no other."""

import psutil
import pytest
from ranks import free_port, run_ranks
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousParameters,
    rendezvous_handler_registry,
)

from rto_megatron.errors import MachineError
from rto_megatron.platform.network import MEETING, interface_address, listening_store, meet


def listens_on(port: int) -> set[str]:
    return {
        one.laddr.ip
        for one in psutil.Process().net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port
    }


def test_an_interface_has_its_address_and_an_unknown_one_names_those_there_are() -> None:
    assert interface_address("lo") == "127.0.0.1"
    with pytest.raises(MachineError, match=r"'ib7' of .* has no IPv4 address; found .*lo \(127\.0\.0\.1\)"):
        interface_address("ib7")


def test_a_store_listens_on_its_address_alone_and_works() -> None:
    store = listening_store("127.0.0.2", 0)
    assert listens_on(store.port) == {"127.0.0.2"}
    store.set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(OSError):
        listening_store("127.0.0.2", store.port)


def test_two_machines_meet_and_get_a_store_for_their_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    port = free_port()
    handlers: list[RendezvousHandler] = []

    def join() -> tuple[int, int, str, set[str], set[str]]:
        # Both are the machine of the endpoint, as several SLURM nodes can be one machine.
        parameters = RendezvousParameters(MEETING, f"127.0.0.2:{port}", "job.0.1", 2, 2, "127.0.0.2")
        handler = meet(parameters)
        handlers.append(handler)  # the other one may still need its store
        found = handler.next_rendezvous()
        where = found.bootstrap_store_info
        listeners = listens_on(where.master_port)
        return found.rank, found.world_size, where.master_addr, listens_on(port), listeners

    met = run_ranks(2, join)
    assert sorted(one[0] for one in met) == [0, 1]
    assert {(one[1], one[2]) for one in met} == {(2, "127.0.0.2")}
    for listeners in ([one[3] for one in met], [one[4] for one in met]):
        assert set().union(*listeners) == {"127.0.0.2"}


def test_torchrun_knows_the_meeting_by_its_name() -> None:
    rendezvous_handler_registry.register(MEETING, meet)
    parameters = RendezvousParameters(MEETING, f"127.0.0.1:{free_port()}", "one", 1, 1, "127.0.0.1")
    assert rendezvous_handler_registry.create_handler(parameters).get_backend() == MEETING
