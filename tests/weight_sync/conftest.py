"""Servers that tests of pushes may spoil and kill; whoever kills one does so in the last file of this folder."""

from collections.abc import Iterator

import pytest
from own_servers import OwnServer, own_server
from pool_server import PoolServer


@pytest.fixture(scope="session")
def sharded_server(pool_server: PoolServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    """Two tensor ranks, where the session's server has one."""
    with own_server(pool_server, tmp_path_factory.mktemp("sharded"), tensor_parallel=2) as server:
        yield server


@pytest.fixture(scope="session")
def single_server(pool_server: PoolServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    """One rank."""
    with own_server(pool_server, tmp_path_factory.mktemp("single"), tensor_parallel=1) as server:
        yield server
