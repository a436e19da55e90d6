"""Keeps the servers of a pool running: one that ends is started again on its port, a bounded number of times.

A server that came back holds no weights of the trainer's; it serves again from the next weight push on.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn
from urllib.parse import urlsplit

from rto_megatron.errors import PoolError, UserError
from rto_megatron.generation.vllm.start.server import (
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

    def is_running(self) -> bool:
        """False once every server is given up."""
        return any(keeper.is_alive() for keeper in self._keepers)

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
        number = 1
        while (kept := _log_of_end(options.log_file, number)).exists():
            number += 1
        options.log_file.rename(kept)
        try:
            return start_server(options)
        except UserError as failure:
            kept.rename(options.log_file)
            self._progress(f"warning: {failure}")
            return ended


@contextmanager
def supervised(
    options: Sequence[ServerOptions], progress: Progress, max_restarts: int = 5
) -> Iterator[Supervisor]:
    """Runs servers: waits until all are ready, keeps them running, and stops them at the end.

    Args:
        options: one entry per server.
        progress: receives lines for the person who waits, from other threads too.
        max_restarts: in a row, per server.

    Raises:
        UserError: a server did not start.
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
        for one, server in servers:
            wait_until_ready(server, progress=progress)
            if one.load_weights:
                label_weights(server, LOADED_VERSION)
            progress(f"inference server {server.address} is ready")
        supervisor = Supervisor(servers, progress, max_restarts)
        starting.pop_all()
    try:
        yield supervisor
    finally:
        supervisor.close()


def serve_pool(
    options: Sequence[ServerOptions], address_file: Path | None = None, progress: Progress = print
) -> NoReturn:
    """Runs servers until SIGTERM or SIGINT, then stops them and exits with status 0.

    Args:
        options: one entry per server.
        address_file: receives one address per line once all servers are ready; removed at the end.
        progress: receives lines for the person who waits.

    Raises:
        PoolError: a server did not start, or all of them ended too often.
    """
    signal.signal(signal.SIGTERM, _exit_on_signal)
    signal.signal(signal.SIGINT, _exit_on_signal)
    # The parts of a server on other machines would wait for a leader that ended; all start again together.
    max_restarts = 5 if all(one.group is None for one in options) else 0
    with supervised(options, progress, max_restarts) as pool:
        try:
            if address_file is not None:
                _write_whole(address_file, "".join(f"{address}\n" for address in pool.addresses))
            while pool.is_running():
                time.sleep(_POLL_S)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if address_file is not None:
                address_file.unlink(missing_ok=True)
    raise PoolError("every inference server of this pool ended too often; the reason of each is above")


def serve_part(options: ServerOptions, progress: Progress = print) -> NoReturn:
    """Runs one machine's part of a larger server, one without HTTP, until SIGTERM or SIGINT.

    Raises:
        PoolError: it ended by itself, as when its leader ends.
    """
    signal.signal(signal.SIGTERM, _exit_on_signal)
    signal.signal(signal.SIGINT, _exit_on_signal)
    raise_file_limit()
    for line in mended(os.environ)[1]:
        progress(f"warning: {line}")
    server = start_server(options)
    try:
        progress(f"part {options.group} of an inference server is starting")
        server.process.wait()
    finally:
        stop_server(server)
    raise PoolError(f"this machine's part of an inference server ended; {server.why_it_ended()}")


def _exit_on_signal(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _log_of_end(log_file: Path, number: int) -> Path:
    return log_file.with_name(f"{log_file.stem}.ended-{number}{log_file.suffix}")


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)  # a reader that polls must never see half of it
