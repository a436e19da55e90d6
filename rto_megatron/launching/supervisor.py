"""Keeps the servers of a pool running: one that ends is started again on its port, a bounded number of times.

A server that came back holds no weights of the trainer's; it serves again from the next weight push on.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import psutil

from rto_megatron.errors import UserError
from rto_megatron.generation.vllm.start.server import (
    START_LIMIT_S,
    Progress,
    Server,
    ServerOptions,
    label_weights,
    start_server,
    stop_server,
    wait_until_ready,
)
from rto_megatron.generation.vllm.start.server_environment import mended
from rto_megatron.platform.open_files import raise_file_limit
from rto_megatron.trainer.background import Background

_POLL_S = 0.5
_FIRST_PAUSE_S = 1.0
LOADED_VERSION = 0  # of weights that servers read from their folder; a trainer's first push replaces it
_PROVEN_AFTER_S = 1800.0  # a server that ran so long has all its restarts before it again


class Supervisor:
    """Watches started servers, one thread each, until `close`; see `supervised`.

    Args:
        servers: each with the options to start it again, its port among them.
        progress: receives lines for the person who waits.
        max_restarts: in a row, per server; then the server is given up.

    Example:
        Supervisor(servers, progress, max_restarts=5).is_running()
    """

    def __init__(
        self, servers: Sequence[tuple[ServerOptions, Server]], progress: Progress, max_restarts: int
    ) -> None:
        self.addresses = tuple(server.address for _, server in servers)
        self._progress = progress
        self._max_restarts = max_restarts
        self._stopping = threading.Event()
        # The kernel's death signal comes when the starting *thread* ends, so a thread keeps what it started.
        self._keepers = [
            threading.Thread(target=self._keep, args=pair, name=f"keeps {pair[1].address}", daemon=True)
            for pair in servers
        ]
        for keeper in self._keepers:
            keeper.start()

    def kept(self) -> list[str]:
        """Addresses of the servers that are not given up."""
        pairs = zip(self.addresses, self._keepers, strict=True)
        return [address for address, keeper in pairs if keeper.is_alive()]

    def is_running(self) -> bool:
        """False once every server is given up."""
        return bool(self.kept())

    def close(self) -> None:
        """Stops all servers and every process of theirs."""
        self._stopping.set()
        for keeper in self._keepers:
            keeper.join()

    def _keep(self, options: ServerOptions, server: Server) -> None:
        num_restarts, started = 0, time.monotonic()
        try:
            while self._ends(server):
                if time.monotonic() - started > _PROVEN_AFTER_S:
                    num_restarts = 0
                status = server.process.returncode
                stop_server(server)  # workers can outlive the process that led them
                if num_restarts == self._max_restarts:
                    self._progress(
                        f"error: inference server {server.address} ended {num_restarts + 1} times and is given up; "
                        f"{server.why_it_ended()}"
                    )
                    return
                num_restarts += 1
                # vLLM exits with status 0 even after its engine was killed, so any end is a failure.
                self._progress(
                    f"warning: inference server {server.address} ended with status {status}; starting it again "
                    f"({num_restarts} of {self._max_restarts})"
                )
                if self._stopping.wait(_FIRST_PAUSE_S * 2 ** (num_restarts - 1)):
                    return
                started = time.monotonic()
                server = self._start_again(options, server)
        finally:
            stop_server(server)

    def _ends(self, server: Server) -> bool:
        """Waits for the server's end; False when it is to be stopped first."""
        while server.process.poll() is None:
            if self._stopping.wait(_POLL_S):
                return False
        return not self._stopping.is_set()

    def _start_again(self, options: ServerOptions, ended: Server) -> Server:
        """The new server, or the ended one, for another round, when it cannot be started."""
        try:
            return start_server(options)
        except UserError as failure:
            self._progress(f"warning: {failure}")
            return ended


class StartingPool:
    """Servers that were started: a thread waits until all of them are ready, and has them kept running from then on.

    Args:
        servers: each with the options to start it again, its port among them.
        progress: receives lines for the person who waits.
        max_restarts: of the `Supervisor` that takes over.
        start_limit_s: for a server to be ready.

    Example:
        with started(options, print) as pool: pool.ready().is_running()
    """

    def __init__(
        self,
        servers: Sequence[tuple[ServerOptions, Server]],
        progress: Progress,
        max_restarts: int,
        start_limit_s: float = START_LIMIT_S,
    ) -> None:
        self.addresses = tuple(server.address for _, server in servers)
        self._servers = servers
        self._progress = progress
        self._max_restarts = max_restarts
        self._start_limit_s = start_limit_s
        self._began = time.monotonic()
        self._handing_over = threading.Lock()
        self._is_closed = False
        self._supervisor: Supervisor | None = None  # from when all are ready
        self._background = Background("waits for servers")
        self._start = self._background.submit(self._wait_for_all)

    def is_settled(self, within_s: float = 0.0) -> bool:
        """Whether all servers are ready, or one did not start, now or within so many seconds."""
        return bool(wait([self._start], within_s).done)

    def has_failed(self) -> bool:
        """Whether a server did not start, as far as is known."""
        return self._start.done() and self._start.exception() is not None

    def ready(self) -> Supervisor:
        """Waits until all servers are ready.

        Raises:
            UserError: one did not start.
        """
        self._start.result()
        assert self._supervisor is not None
        return self._supervisor

    def close(self) -> None:
        """Stops all servers and every process of theirs."""
        with self._handing_over:
            self._is_closed = True
        if self._supervisor is None:
            for _, server in self._servers:
                stop_server(server)
        else:
            self._supervisor.close()
        self._background.close()
        wait([self._start])

    def _wait_for_all(self) -> None:
        for one, server in self._servers:
            wait_until_ready(server, self._start_limit_s, self._progress)
            if one.load_weights:
                label_weights(server, LOADED_VERSION)
            self._progress(f"inference server {server.address} is ready {self._after(server)}")
        with self._handing_over:
            if not self._is_closed:
                self._supervisor = Supervisor(self._servers, self._progress, self._max_restarts)

    def _after(self, server: Server) -> str:
        """How long that took, and of it vLLM's API server before it started the engine, and the engine."""
        whole = time.monotonic() - self._began
        try:
            process = psutil.Process(server.process.pid)
            alone = min(one.create_time() for one in process.children()) - process.create_time()
        except (psutil.Error, ValueError):  # it has just ended, or has no process beside it
            return f"after {whole:.0f} s"
        return f"after {whole:.0f} s (API server {alone:.0f}, engine {whole - alone:.0f})"


@contextmanager
def started(
    options: Sequence[ServerOptions],
    progress: Progress,
    max_restarts: int = 5,
    start_limit_s: float = START_LIMIT_S,
) -> Iterator[StartingPool]:
    """Starts servers and does not wait: once all are ready they are kept running, and stopped at the end.

    Args:
        options: one entry per server.
        progress: receives lines for the person who waits, from other threads too.
        max_restarts: in a row, per server, once all were ready.
        start_limit_s: for a server to be ready.

    Raises:
        UserError: a server cannot be started.
    """
    raise_file_limit()
    for line in mended(os.environ)[1]:
        progress(f"warning: {line}")
    with ExitStack() as starting:
        servers = []
        for one in options:
            server = start_server(one)
            starting.callback(stop_server, server)
            servers.append((replace(one, port=urlsplit(server.address).port), server))
        pool = StartingPool(servers, progress, max_restarts, start_limit_s)
        starting.pop_all()
    try:
        yield pool
    finally:
        pool.close()


@contextmanager
def supervised(
    options: Sequence[ServerOptions],
    progress: Progress,
    max_restarts: int = 5,
    start_limit_s: float = START_LIMIT_S,
) -> Iterator[Supervisor]:
    """Does what `started` does, and waits until all servers are ready.

    Raises:
        UserError: a server did not start.
    """
    with started(options, progress, max_restarts, start_limit_s) as pool:
        yield pool.ready()
