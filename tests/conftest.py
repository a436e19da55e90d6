"""Shared settings: one device preparation before anything imports megatron.core."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest

HAS_STANDIN = "RTO_TEST_TRANSFORMER_ENGINE" in os.environ  # launchers/test_te.sh
collect_ignore = [] if HAS_STANDIN else ["fused"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--fast`, which `launchers/test.sh --fast` hands on."""
    parser.addoption("--fast", action="store_true", help="leave out what starts ranks, servers or programs")


def pytest_configure(config: pytest.Config) -> None:
    """Prepares the processes that run tests; one that only shares them out need not load what they do."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        from rto_megatron.config.training import FrozenPrecisionConfig
        from rto_megatron.platform.device import prepare

        if HAS_STANDIN:
            import fused.standin

            fused.standin.install()
            prepare()
        else:  # launchers/test_gpu.sh runs the same tests with other kernels
            prepare(FrozenPrecisionConfig(kernels=os.environ.get("RTO_TEST_KERNELS", "torch")))
        # A shell's background jobs ignore it, and so would every launcher that a test interrupts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import pool_server

        config.pluginmanager.register(pool_server)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Puts back the variables that a command sets for the rest of its process, which here is that of other tests."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shares the tests out over processes by file, but for those with vLLM servers, which one process runs.

    It begins with them, as they take the longest and leave a core to the others for much of it.
    """
    for item in items:
        if isinstance(item, pytest.Function) and "pool_server" in item.fixturenames:
            item.add_marker("pool")
    if config.getoption("fast"):
        slow = [item for item in items if item.get_closest_marker("pool") or _starts_processes(item)]
        config.hook.pytest_deselected(items=slow)
        kept = set(items).difference(slow)
        items[:] = [item for item in items if item in kept]
    for item in items:
        group = "pool" if item.get_closest_marker("pool") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("pool") is None)


def _starts_processes(item: pytest.Item) -> bool:
    """Whether its file can: it has imported what does."""
    starters = {"run_ranks", "subprocess", "launched"}
    return isinstance(item, pytest.Function) and not starters.isdisjoint(vars(item.module))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuses to share the tests out one by one: each process would build every fixture and start every server."""
    if getattr(session.config.option, "loadgroup", False):  # as pytest-xdist tells its processes
        alone = [item.nodeid for item in session.items if "@" not in item.nodeid]
        if alone:
            raise pytest.UsageError(f"pytest-xdist did not group {len(alone)} tests, the first is {alone[0]}")
