"""Servers that end are started again, a bounded number of times; the processes here are no servers."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rto_megatron.errors import ModelFolderError
from rto_megatron.generation.vllm.start.server import Server, ServerOptions
from rto_megatron.launching.supervisor import Supervisor, supervised

PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
time.sleep(600)
"""


@pytest.fixture
def options(tmp_path: Path) -> ServerOptions:
    """The options of a server that starts and soon ends: its model is none that vLLM knows."""
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    return ServerOptions(tmp_path, tmp_path / "token", tmp_path / "server.log")


def server_of(options: ServerOptions, script: str) -> Server:
    options.log_file.write_text("its first words\n")
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    return Server("http://127.0.0.1:9", process, options.token_file, options.log_file)


def wait_for(lines: list[str], words: str) -> None:
    deadline = time.monotonic() + 60
    while not any(words in line for line in lines):
        assert time.monotonic() < deadline, lines
        time.sleep(0.05)


def test_an_ended_server_is_started_again_and_its_log_is_kept(options: ServerOptions) -> None:
    said: list[str] = []
    supervisor = Supervisor([(options, server_of(options, PARENT))], said.append, 5)
    children = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
    (leader,) = (one for one in children if one.cmdline()[-1:] == [PARENT])
    while not (orphans := leader.children()):
        time.sleep(0.05)
    leader.kill()
    wait_for(said, "ended with status -9; starting it again (1 of 5)")
    while not options.log_file.with_name("server.ended-1.log").exists():
        time.sleep(0.05)
    supervisor.close()
    assert options.log_file.with_name("server.ended-1.log").read_text() == "its first words\n"
    psutil.wait_procs(orphans, 5)
    assert not any(one.is_running() for one in orphans)


def test_restarts_are_bounded_and_a_server_that_cannot_start_uses_them_up(
    options: ServerOptions, tmp_path: Path
) -> None:
    said: list[str] = []
    gone = server_of(options, "pass")
    (tmp_path / "config.json").unlink()
    supervisor = Supervisor([(options, gone)], said.append, 2)
    wait_for(said, "is given up")
    supervisor.close()
    assert not supervisor.is_running()
    assert [line.split(";")[0] for line in said] == [
        "warning: inference server http://127.0.0.1:9 ended with status 0",
        f"warning: {tmp_path} has no config.json",
        "warning: inference server http://127.0.0.1:9 ended with status 0",
        f"warning: {tmp_path} has no config.json",
        "error: inference server http://127.0.0.1:9 ended 3 times and is given up",
    ]
    assert "its first words" in said[-1]


def test_closing_stops_a_server_and_starts_none(options: ServerOptions) -> None:
    said: list[str] = []
    server = server_of(options, "import time; time.sleep(600)")
    supervisor = Supervisor([(options, server)], said.append, 5)
    supervisor.close()
    assert server.process.returncode is not None and said == []
    assert not supervisor.is_running()


def test_a_start_that_fails_stops_the_servers_that_did_start(options: ServerOptions, tmp_path: Path) -> None:
    wrong = ServerOptions(tmp_path / "absent", options.token_file, options.log_file)
    before = {one.pid for one in psutil.Process().children()}
    with pytest.raises(ModelFolderError, match="absent does not exist"), supervised([options, wrong], print):
        raise AssertionError("not reached")
    assert {one.pid for one in psutil.Process().children()} <= before
