"""What a pool and a trainer open to the network: loopback alone, and nothing without the token."""

import httpx
import psutil
import pytest
from pool_server import PoolServer, tiny_llama
from weight_sync.trainer_ranks import ModelSource, TrainerRanks

pytestmark = pytest.mark.pool


def listeners(process: psutil.Process) -> set[tuple[str, int]]:
    """(address, port) of the TCP sockets on which a process and its children listen."""
    family = [process, *process.children(recursive=True)]
    return {
        (one.laddr.ip, one.laddr.port)
        for member in family
        for one in member.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    }


def server_process(server: PoolServer) -> psutil.Process:
    port = int(server.address.rsplit(":", 1)[1])
    (owner,) = {
        one.pid
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port
    }
    return psutil.Process(owner)


def test_server_and_trainer_listen_on_loopback_only(pool_server: PoolServer) -> None:
    ranks = TrainerRanks(pool_server, [ModelSource(tiny_llama(1), 2)] * 2)
    ranks.push(1)  # the communicator stays open
    opened = listeners(server_process(pool_server)) | listeners(psutil.Process())
    ranks.close()
    print(sorted(opened))
    assert len(opened) >= 3  # HTTP, the meeting point and gloo's listeners
    assert {address for address, _ in opened} == {"127.0.0.1"}


def test_every_route_of_a_server_demands_the_token(pool_server: PoolServer) -> None:
    with httpx.Client(base_url=pool_server.address, timeout=30) as stranger:
        friend = {"Authorization": f"Bearer {pool_server.token}"}
        paths = stranger.get("/openapi.json", headers=friend).json()["paths"]
        routes = [(method, path) for path, methods in paths.items() for method in methods]
        names = {path for _, path in routes}
        assert {"/update_weights", "/pause", "/inference/v1/generate", "/health"} <= names
        answers = {route: stranger.request(*route).status_code for route in routes}
        assert {route for route, status in answers.items() if status != 401} == set()
        print(f"{len(routes)} routes")
        wrong = {"Authorization": f"Bearer {'b' * 64}"}
        assert stranger.post("/update_weights", headers=wrong, json={}).status_code == 401
