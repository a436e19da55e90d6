"""The quickstart's script around its stages: order, logs, failures, and a pool that never outlives it."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launchers.pretending import is_running, pretending_checkout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return pretending_checkout(tmp_path / "checkout")


def quickstart(
    checkout: Path,
    fails: str = "nothing",
    hangs: str = "nothing",
    num_gpus: int = 0,
    root: str = "run",
    **environment: str,
) -> subprocess.Popen[str]:
    smi = checkout / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    listed = "".join(f"echo 'GPU {gpu}: NVIDIA X (UUID: GPU-{gpu})'\n" for gpu in range(num_gpus))
    smi.write_text(f"#!/bin/sh\n{listed}" if num_gpus else "#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    return subprocess.Popen(
        ["bash", "launchers/quickstart.sh", "--budget", "small", "--root", root],
        cwd=checkout,
        env={
            "PATH": f"{smi.parent}:{os.environ['PATH']}",
            "HOME": str(checkout),
            "FAILS": fails,
            "HANGS": hangs,
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_stages_run_in_order_with_the_pool_and_its_end(checkout: Path) -> None:
    process = quickstart(checkout)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    asked = (checkout / "asked").read_text().splitlines()
    commands = [line.replace("--ranks 2 ", "") for line in asked if not line.startswith("pool")]
    names = [Path(command.split()[1]).stem for command in commands]
    made_of = {
        "sft": ["task"],
        "reward_model": ["sft"],
        "dpo": ["sft"],
        "rto": ["dpo", "reward_model"],
        "evaluate": ["rto"],
    }
    for name, sources in made_of.items():
        assert all(names.index(source) < names.index(name) for source in sources), names
    assert names[-1] == "run"  # the table of its evaluations
    rto = next(line for line in asked if "quickstart/rto.yaml" in line)
    assert "rollout.servers=[http://127.0.0.1:4242] rollout.token_file=run/pool/token run.steps=2" in rto
    assert "Run folder: run" in output
    assert "Next: " in output
    assert not is_running(checkout / "pool.pid")


@pytest.mark.parametrize(
    ("num_gpus", "environment", "trainer", "pool"),
    [
        (0, {}, " cpu", " cpu"),
        (3, {}, "0,1 gpu", "2 gpu"),
        (8, {}, "0,1 gpu", "7 gpu"),
        (8, {"CUDA_VISIBLE_DEVICES": "2,5,4,3"}, "2,5 gpu", "3 gpu"),
        (2, {"RTO_VARIANT": "cpu"}, " cpu", " cpu"),
    ],
)
def test_ranks_and_pool_get_gpus_of_their_own_or_none(
    checkout: Path, num_gpus: int, environment: dict[str, str], trainer: str, pool: str
) -> None:
    process = quickstart(checkout, num_gpus=num_gpus, **environment)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    seen = dict(line.split(" ", 1) for line in (checkout / "devices").read_text().splitlines())
    assert (seen["launch"], seen["pool"]) == (trainer, pool)
    stages = [line for line in (checkout / "asked").read_text().splitlines() if line.startswith("launch")]
    assert all(line.startswith("launch --ranks 2 ") for line in stages)


@pytest.mark.parametrize(
    ("num_gpus", "environment"), [(1, {}), (2, {}), (8, {"CUDA_VISIBLE_DEVICES": "0,1"})]
)
def test_one_or_two_gpus_are_refused_with_the_way_to_the_cpu(
    checkout: Path, num_gpus: int, environment: dict[str, str]
) -> None:
    process = quickstart(checkout, num_gpus=num_gpus, **environment)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "the quickstart needs at least 3 (2 trainer ranks and 1 for the pool)" in errors
    assert "RTO_VARIANT=cpu bash launchers/quickstart.sh" in errors
    assert not (checkout / "asked").exists()


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


def test_the_way_on_from_a_run_folder_of_any_name_can_be_pasted(checkout: Path) -> None:
    root = "a run #1: it's [x] $HOME"
    process = quickstart(checkout, fails="quickstart/rto.yaml", root=root)
    _, errors = process.communicate(timeout=60)
    assert shlex.split(errors.splitlines()[-1])[-2:] == ["--root", root]
    assert (checkout / root / "logs" / "rto.log").is_file()
    assert f"vars.root={root}" in (checkout / "asked").read_text()


@pytest.mark.parametrize(
    ("stage", "took", "said"),
    [(1, 100, "10 min"), (2, 5, "10 min"), (2, 110, "16 min"), (5, 500, "8 min"), (7, 585, "64 s")],
)
def test_the_time_left_trusts_what_short_first_stages_took_little(
    stage: int, took: int, said: str, checkout: Path
) -> None:
    script = f"""
        set -eu
        . launchers/staged.sh
        stages 10 75 95 95 110 150 60
        began=0 stage={stage} SECONDS={took}
        time_left"""
    told = subprocess.run(["bash", "-c", script], cwd=checkout, capture_output=True, text=True, check=True)
    assert told.stdout == f"{said}\n"
