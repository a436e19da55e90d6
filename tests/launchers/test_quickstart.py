"""The quickstart's script around its stages: order, logs, failures, and a pool that never outlives it."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands for the `rto` command: notes what it was asked, serves until SIGTERM as a pool, fails or hangs where told.
PRETENDING_RTO = """#!/bin/bash
echo "$@" >>"$HOME/asked"
[ "$1" = synthesize ] && mkdir -p "$2"
case "$*" in
  pool*)
    echo $$ >"$HOME/pool.pid"
    while [ "$1" != --address-file ]; do shift; done
    echo http://127.0.0.1:4242 >"$2"
    trap 'exit 0' TERM
    while :; do sleep 0.1; done ;;
  *"$FAILS"*) echo noise; echo "error: models.policy is missing" >&2; exit 2 ;;
  *"$HANGS"*) echo $$ >"$HOME/stage.pid"; exec sleep 60 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "launchers", folder / "launchers")
    (folder / "launchers" / "setup.sh").write_text("exit 0\n")
    command = folder / ".venv" / "bin" / "rto"
    command.parent.mkdir(parents=True)
    command.write_text(PRETENDING_RTO)
    command.chmod(0o755)
    return folder


def quickstart(checkout: Path, fails: str = "nothing", hangs: str = "nothing") -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", "launchers/quickstart.sh", "--budget", "small", "--root", "run"],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "HOME": str(checkout), "FAILS": fails, "HANGS": hangs},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_running(pid_file: Path) -> bool:
    return Path(f"/proc/{pid_file.read_text().strip()}/cmdline").exists()


def test_stages_run_in_order_with_the_pool_and_its_end(checkout: Path) -> None:
    process = quickstart(checkout)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    asked = (checkout / "asked").read_text().splitlines()
    commands = [line.split()[:2] for line in asked if not line.startswith("pool")]
    names = [Path(arguments[1]).stem for arguments in commands]
    assert names == ["task", "sft", "reward_model", "dpo", "ppo", "rto", *["evaluate"] * 4, "run"]
    rto = next(line for line in asked if "quickstart/rto.yaml" in line)
    assert "rollout.servers=[http://127.0.0.1:4242] rollout.token_file=run/pool/token run.steps=2" in rto
    assert "Run folder: run" in output
    assert "Next: " in output
    assert not is_running(checkout / "pool.pid")


def test_failed_stage_shows_its_error_stops_the_pool_and_names_the_way_on(checkout: Path) -> None:
    process = quickstart(checkout, fails="quickstart/rto.yaml")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[0] == "error: models.policy is missing"
    assert "quickstart.sh --budget small --root run" in errors
    assert (checkout / "run" / "logs" / "rto.log").read_text().startswith("noise")
    assert not is_running(checkout / "pool.pid")


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_stage_and_the_pool(checkout: Path, signum: signal.Signals, status: int) -> None:
    process = quickstart(checkout, hangs="quickstart/ppo.yaml")
    deadline = time.monotonic() + 30
    while not (checkout / "stage.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)
    process.communicate(timeout=30)
    assert process.returncode == status
    assert not is_running(checkout / "stage.pid")
    assert not is_running(checkout / "pool.pid")
