"""A planned fault fires at its place, step and rank, and as often as the plan names it, restarts included."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rto_megatron.errors import MachineError
from rto_megatron.platform import faults


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RTO_FAULT_LOG", str(tmp_path / "fired"))
    monkeypatch.setenv("RANK", "1")
    return tmp_path / "fired"


def test_nothing_happens_without_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RTO_FAULT", raising=False)
    assert not faults.at("fwd_bwd", 1)


def test_a_fault_has_one_place_step_and_rank(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTO_FAULT", "fwd_bwd:2:1:nan,logprob:1:1:nan")
    assert not any([faults.at("fwd_bwd", 1), faults.at("opt_step", 2), faults.at("logprob", 2)])
    monkeypatch.setenv("RANK", "0")
    assert not faults.at("fwd_bwd", 2)
    monkeypatch.setenv("RANK", "1")
    assert faults.at("fwd_bwd", 2)
    assert log.read_text() == "fwd_bwd:2:1:nan\n"


def test_it_fires_as_often_as_the_plan_names_it(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTO_FAULT", "fwd_bwd:2:1:nan, fwd_bwd:2:1:nan")
    assert [faults.at("fwd_bwd", 2) for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("kind", "error"), [("raise", faults.InjectedFault), ("oom", MemoryError), ("disk", OSError)]
)
def test_kinds_that_raise(
    kind: str, error: type[Exception], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RTO_FAULT", f"opt_step:3:1:{kind}")
    with pytest.raises(error) as raised:
        faults.at("opt_step", 3)
    assert kind != "disk" or raised.value.errno == errno.ENOSPC
    assert not faults.at("opt_step", 3)


@pytest.mark.parametrize(
    ("kind", "status"), [("kill", -signal.SIGKILL), ("exit17", 17), ("segfault", -signal.SIGSEGV)]
)
def test_kinds_that_end_the_process(kind: str, status: int, log: Path) -> None:
    code = "from rto_megatron.platform import faults; faults.at('opt_step', 3)"
    environment = {**os.environ, "RTO_FAULT": f"opt_step:3:1:{kind}"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True)
    assert ended.returncode == status
    assert log.read_text() == f"opt_step:3:1:{kind}\n"


@pytest.mark.parametrize(
    "plan", ["fwd_bwd:1:0", "nowhere:1:0:kill", "fwd_bwd:x:0:kill", "fwd_bwd:1:0:explode"]
)
def test_a_plan_that_cannot_be_read_is_refused(plan: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTO_FAULT", plan)
    with pytest.raises(MachineError, match="site:step:rank:kind"):
        faults.at("fwd_bwd", 1)


def test_a_plan_needs_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTO_FAULT", "fwd_bwd:1:0:nan")
    monkeypatch.delenv("RTO_FAULT_LOG", raising=False)
    with pytest.raises(MachineError, match="RTO_FAULT_LOG"):
        faults.at("fwd_bwd", 1)
