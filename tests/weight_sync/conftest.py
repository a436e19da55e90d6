"""Servers that tests of pushes may spoil and kill; whoever kills one does so in the last file of this folder."""

from collections.abc import Iterator

import pytest
from own_servers import OwnServer, own_servers
from pool_server import PoolServer


@pytest.fixture(scope="session")
def pair(pool_server: PoolServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[OwnServer]]:
    with own_servers(pool_server, tmp_path_factory.mktemp("own"), tensor_parallel=[2, 1]) as servers:
        yield servers


@pytest.fixture(scope="session")
def sharded_server(pair: list[OwnServer]) -> OwnServer:
    """Two tensor ranks, where the session's server has one."""
    return pair[0]


@pytest.fixture(scope="session")
def single_server(pair: list[OwnServer]) -> OwnServer:
    """One rank."""
    return pair[1]
