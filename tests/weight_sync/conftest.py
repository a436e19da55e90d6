"""Servers of a test's own beside the session's, whose token and model they have: to be spoilt and killed.

Whoever kills one does so in the last file of this folder.
"""

from collections.abc import Iterator

import pytest
from pool_server import PoolServer, start_pool_server


@pytest.fixture(scope="session")
def sharded_server(pool_server: PoolServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolServer]:
    """Two tensor ranks, where the session's server has one."""
    folder = tmp_path_factory.mktemp("sharded")
    yield from start_pool_server(
        folder, pool_server.model, pool_server.token_file, tensor_parallel=2, is_loaded=False
    )


@pytest.fixture(scope="session")
def single_server(pool_server: PoolServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolServer]:
    """One rank."""
    folder = tmp_path_factory.mktemp("single")
    yield from start_pool_server(folder, pool_server.model, pool_server.token_file, is_loaded=False)
