"""What ends a vLLM server before it serves is told in a sentence, or made right."""

import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.config.addresses import without_localhost
from rto_megatron.generation.vllm.start.server_environment import environment_problems, mended
from rto_megatron.generation.vllm.start.server_log import first_error, keep_log_before
from rto_megatron.models.model_folder import pattern_problems

LONG = "/scratch/" + "x" * 90


def test_a_service_variable_of_kubernetes_is_no_port() -> None:
    """A service named vllm gives every container of its namespace VLLM_PORT=tcp://10.0.0.7:8000."""
    environment, said = mended({"VLLM_PORT": "tcp://10.0.0.7:8000", "HOME": "/h"})
    assert environment == {"HOME": "/h"}
    assert ["VLLM_PORT=tcp://10.0.0.7:8000 is not given to the servers" in line for line in said] == [True]
    assert mended({"VLLM_PORT": "8000"}) == ({"VLLM_PORT": "8000"}, [])


def test_sockets_have_paths_that_linux_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", LONG)
    environment, said = mended({})
    assert environment == {"VLLM_RPC_BASE_PATH": "/tmp"}
    assert LONG in said[0] and "107 bytes" in said[0]
    assert mended({"VLLM_RPC_BASE_PATH": "/s"})[0] == {"VLLM_RPC_BASE_PATH": "/s"}
    (problem,) = environment_problems([1], {"VLLM_RPC_BASE_PATH": LONG})
    assert problem.startswith(f"VLLM_RPC_BASE_PATH={LONG} is too long") and "at most 70" in problem
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert mended({}) == ({}, [])


@pytest.mark.parametrize(("sizes", "is_refused"), [([1], False), ([1, 2], True)])
def test_too_little_shared_memory_is_named_where_workers_need_it(
    sizes: list[int], is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 63 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    problems = environment_problems(sizes, {}, tmp_path)
    assert ["63 MiB free" in one and "--shm-size=16g" in one for one in problems] == [True] * is_refused


CAUSE_FIRST = """\
(EngineCore pid=71) INFO 11-29 03:00:01 [core.py:90] Initializing an engine
(EngineCore pid=71) ERROR 11-29 03:00:02 [core.py:700] EngineCore failed to start.
(EngineCore pid=71) ERROR 11-29 03:00:02 [core.py:700] Traceback (most recent call last):
(EngineCore pid=71) ERROR 11-29 03:00:02 [core.py:700]   File "core.py", line 7, in run
(EngineCore pid=71) ERROR 11-29 03:00:02 [core.py:700]     load()
(EngineCore pid=71) ERROR 11-29 03:00:02 [core.py:700] ValueError: no room for the KV cache
(APIServer pid=70) Traceback (most recent call last):
(APIServer pid=70)   File "api.py", line 1, in main
(APIServer pid=70) RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (CAUSE_FIRST, "ValueError: no room for the KV cache"),
        ("(APIServer pid=70) ERROR 11-29 03:00:02 [a.py:7] out of luck\nmore", "out of luck"),
        ("vllm: error: unrecognized arguments: --x", "vllm: error: unrecognized arguments: --x"),
        ("INFO 11-29 03:00:01 [a.py:1] ready\n", None),
        ("", None),
    ],
)
def test_the_first_error_of_a_log_is_its_cause(log: str, error: str | None) -> None:
    assert first_error(log.splitlines()) == error


def test_the_log_of_every_server_before_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "pool" / "server-0.log"
    for words in ("first", "second"):
        keep_log_before(log)
        log.write_text(words)
    keep_log_before(log)
    assert {path.name: path.read_text() for path in log.parent.iterdir()} == {
        "server-0.ended-1.log": "first",
        "server-0.ended-2.log": "second",
    }


@pytest.mark.parametrize(
    ("address", "number"),
    [
        ("http://localhost:8000", "http://127.0.0.1:8000"),
        ("https://localhost", "https://127.0.0.1"),
        ("localhost:29500", "127.0.0.1:29500"),
        ("localhost", "127.0.0.1"),
        ("http://localhost.localdomain:8000", "http://localhost.localdomain:8000"),
        ("http://gpu1:8000", "http://gpu1:8000"),
    ],
)
def test_localhost_is_asked_for_by_its_number(address: str, number: str) -> None:
    assert without_localhost(address) == number


def test_a_path_that_vllm_reads_as_a_pattern_is_refused_where_it_reads_weights(tmp_path: Path) -> None:
    folder = tmp_path / "exp [1]"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    given = ["--token-file", str(tmp_path / "token"), "--load-weights"]
    refused = CliRunner().invoke(app, ["pool", str(folder), *given])
    assert refused.exit_code != 0
    assert "as a pattern and finds no weights" in str(refused.exception)
    assert pattern_problems(tmp_path / "exp (1) #1") == []
