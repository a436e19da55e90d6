"""Ranks start while the pool of their launch does, and go on once it is ready; the server here is none of vLLM's."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ranks import free_port

from rto_megatron.errors import PoolError
from rto_megatron.generation.vllm.start.server import Server, ServerOptions, ensure_token_file
from rto_megatron.launching.launched_pool import LaunchedPool
from rto_megatron.launching.supervisor import StartingPool
from rto_megatron.lifecycle.launched_beside import await_pool

# Answers as a paused server does, once a file is there.
PAUSED = """
import http.server, pathlib, sys
port, awaited = int(sys.argv[1]), pathlib.Path(sys.argv[2])
class Paused(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"is_paused": true}'
        self.send_response(200 if awaited.exists() else 503)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", port), Paused).serve_forever()
"""


def starting_pool(
    folder: Path, awaited: Path, said: list[str], limit_s: float = 600
) -> tuple[StartingPool, Server]:
    """A pool of one server that is ready once `awaited` is there."""
    options, server = paused_server(folder, awaited)
    return StartingPool([(options, server)], said.append, 5, limit_s), server


def paused_server(folder: Path, awaited: Path, log: str = "server.log") -> tuple[ServerOptions, Server]:
    """A process that answers as a server once `awaited` is there."""
    options = ServerOptions(folder, folder / "token", folder / log)
    ensure_token_file(options.token_file)
    options.log_file.touch()
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, str(port), str(awaited)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return options, Server(f"http://127.0.0.1:{port}", process, options.token_file, options.log_file)


def test_ranks_start_beside_the_pool_and_wait_for_it(tmp_path: Path) -> None:
    said: list[str] = []
    pool, server = starting_pool(tmp_path, tmp_path / "go", said)
    starting = tmp_path / "starting"
    starting.touch()
    launched = LaunchedPool(pool, tmp_path / "token", is_colocated=False, starting_file=starting)

    def ranks() -> None:
        assert not pool.is_settled()
        rank = threading.Thread(target=await_pool, daemon=True)
        rank.start()
        rank.join(0.3)
        assert rank.is_alive()
        (tmp_path / "go").touch()
        rank.join(60)
        assert not rank.is_alive() and pool.is_settled()

    try:
        assert launched.beside(ranks) is None
        assert launched.prepare(2)
        await_pool()  # those of a second attempt
        assert said[-1].startswith(f"inference server {server.address} is ready after ")
    finally:
        pool.close()
    assert server.process.returncode is not None and not pool.ready().is_running()


def test_an_attempt_does_not_wait_for_a_server_that_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    lost, kept = (paused_server(tmp_path, tmp_path / "go", log) for log in ("0.log", "1.log"))
    pool = StartingPool([lost, kept], [].append, max_restarts=0)
    launched = LaunchedPool(pool, tmp_path / "token", is_colocated=False, starting_file=tmp_path / "starting")
    answers: list[bool] = []
    try:
        supervisor = pool.ready()
        lost[1].process.kill()
        waits = threading.Thread(target=lambda: answers.append(launched.prepare(2)), daemon=True)
        waits.start()
        waits.join(30)
        assert answers == [True] and supervisor.kept() == [kept[1].address]
    finally:
        pool.close()
    assert supervisor.kept() == []


def test_a_server_that_takes_longer_than_it_may_does_not_start(tmp_path: Path) -> None:
    pool, server = starting_pool(tmp_path, tmp_path / "never", [], limit_s=0.5)
    try:
        with pytest.raises(PoolError, match=rf"{server.address} not ready after [12] s"):
            pool.ready()
    finally:
        pool.close()


def test_a_pool_that_is_still_starting_can_be_closed(tmp_path: Path) -> None:
    said: list[str] = []
    pool, server = starting_pool(tmp_path, tmp_path / "never", said)
    assert not pool.is_settled() and not pool.has_failed()
    pool.close()
    assert server.process.returncode is not None
    assert pool.is_settled() and pool.has_failed() and not any("again" in line for line in said)
