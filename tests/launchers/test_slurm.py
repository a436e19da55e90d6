"""A job on a real SLURM of three nodes, all of them this machine: a killed rank, the end of its time, and its end.

The job asks for what the cluster has in name only: GPUs, a feature, a quality of service.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from trainer.tiny_runs import configure, write_files

from rto_megatron.launching.slurm_job import ROOT, Allocation, plan_job
from rto_megatron.lifecycle.status import ExitReason, read_status
from rto_megatron.reporting.metrics import read_metrics

CLUSTER = ROOT / "launchers" / "slurm" / "test_cluster.sh"
STEPS = 12
# What bash, sbatch, YAML or the pattern of a log's name would read as something else.
STRANGE = '50% #1, %j: it\'s [x] $HOME "q"'
# Stands for the environment's `rto`: its pool is an address that an offline stage never asks.
PRETENDING_RTO = f"""#!/bin/bash
for given; do
  case $given in rollout.*) echo "$given" >>"$NOTES/given" ;; *) kept+=("$given") ;; esac
done
[ "$1" = pool ] || exec {ROOT}/.venv/bin/rto "${{kept[@]}}"
trap 'echo stopped >>"$NOTES/pool_ends"; exit 0' TERM
while [ "$1" != --address-file ]; do shift; done
echo http://192.0.2.77:4242 >"$2"
while :; do sleep 0.2; done
"""
# Stands for Apptainer: notes the node and the image, and runs the command.
PRETENDING_APPTAINER = """#!/bin/bash
while [[ $1 != *.sif ]]; do shift; done
echo "$SLURMD_NODENAME $SLURM_JOB_ID $CUDA_VISIBLE_DEVICES $1" >>"$NOTES/apptainer"
exec "${@:2}"
"""


@pytest.fixture
def cluster() -> Iterator[Path]:
    """Three nodes; SLURM is installed if it can be."""
    if os.geteuid() != 0:
        pytest.skip("a cluster of this test's own needs root")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # short, as the paths of its sockets must be
    started = subprocess.run(["bash", CLUSTER, "start", folder], capture_output=True, text=True, check=False)
    try:
        if started.returncode:
            pytest.skip(f"no SLURM can be started here: {started.stderr.strip()}")
        yield folder
    finally:
        subprocess.run(["bash", CLUSTER, "stop", folder], check=False)
        shutil.rmtree(folder)


def run(cluster: Path, *command: str | Path) -> str:
    settings = {**os.environ, "SLURM_CONF": str(cluster / "slurm.conf")}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)
    path.chmod(0o755)


def write_job(tmp_path: Path, **variables: str) -> tuple[Path, Path]:
    """A script with a pool beside an offline stage, and the run folder; `variables` come with the preamble."""
    files, run_dir = tmp_path / "files", tmp_path / STRANGE / "run"
    files.mkdir()
    write_files(files)
    write_program(tmp_path / "checkout" / ".venv" / "bin" / "rto", PRETENDING_RTO)
    write_program(tmp_path / "programs" / "apptainer", PRETENDING_APPTAINER)
    preamble = tmp_path / "modules.sh"
    exports = [f"export {name}={value}" for name, value in variables.items()]
    preamble.write_text("\n".join(["echo loading", *exports, f"export PATH={tmp_path}/programs:$PATH"]))
    asked = Allocation(
        2,
        interface="lo",
        gres="gpu:1",
        qos="any",
        constraint="tested",
        apptainer="our.sif",
        preamble=preamble,
    )
    script = plan_job(
        configure("sft", files, run_dir, "tp2", run__steps=STEPS), asked, 1, 3, [], None
    ).write()
    text = script.read_text().replace("#SBATCH --nodes=2", "#SBATCH --nodes=3")
    for setting in (f"root={tmp_path}/checkout", "pool_nodes=1", "num_servers=1"):
        name = setting.split("=")[0]
        text = re.sub(rf"^{name}=.*$", setting, text, count=1, flags=re.MULTILINE)
    script.write_text(text)
    return script, run_dir


def processes_of(job: str) -> list[str]:
    found = []
    for one in psutil.process_iter(["cmdline", "environ"]):
        if (one.info["environ"] or {}).get("SLURM_JOB_ID") == job:
            found.append(" ".join(one.info["cmdline"] or ()))
    return found


@pytest.mark.slow
def test_a_job_survives_a_killed_rank_and_the_end_of_its_time(cluster: Path, tmp_path: Path) -> None:
    faults = {"RTO_FAULT": "opt_step:3:1:kill", "RTO_FAULT_LOG": str(tmp_path / "faults")}
    script, run_dir = write_job(tmp_path, **faults, NOTES=str(tmp_path))
    job = run(cluster, "sbatch", "--parsable", "--export=NONE", script).strip()
    log = run_dir / "slurm" / f"log-{job}.txt"

    def wait_until(holds: str) -> None:
        deadline = time.monotonic() + 400
        while not log.exists() or not re.search(holds, log.read_text(), re.DOTALL):
            said = log.read_text() if log.exists() else "no log"
            assert time.monotonic() < deadline and "ended: REPEATED" not in said, said
            time.sleep(0.2)

    wait_until(r"attempt 2\].*sft 4/")
    run(cluster, "scancel", "--batch", "--signal=USR1", job)
    wait_until(r"the trainer ended: PREEMPTED after step \d+.*the trainer ended: DONE")
    while processes_of(job):
        time.sleep(0.2)
    said = log.read_text()
    print(said)
    assert "rank 1 was ended by SIGKILL after step 2" in said
    assert f"resumed sft from {run_dir}/checkpoints/step_000002" in said
    (stopped,) = {int(step) for step in re.findall(r"PREEMPTED after step (\d+)", said)}
    assert 4 <= stopped < STEPS
    assert f"start 1, attempt 1] the trainer ended: DONE after step {STEPS}" in said
    assert f"resumed sft from {run_dir}/checkpoints/step_{stopped:06d}" in said
    assert [entry["step"] for entry in read_metrics(run_dir)] == list(range(1, STEPS + 1))
    status = read_status(run_dir)
    assert status is not None and status.reason is ExitReason.DONE
    # The pool outlived the failed attempt, and was told to stop at the end of each start.
    announced = [path.name for path in sorted((run_dir / "pool").glob("announced-*"))]
    assert announced == [f"announced-{job}.0.1", f"announced-{job}.1.1"]
    assert (tmp_path / "pool_ends").read_text() == "stopped\n" * 2
    token = run_dir / "pool" / "token"
    assert (tmp_path / "given").read_text().splitlines()[:2] == [
        "rollout.servers=[http://192.0.2.77:4242]", f"rollout.token_file={token}"
    ]  # fmt: skip
    assert token.stat().st_mode & 0o077 == 0 and len(token.read_text()) == 64
    assert token.read_text() not in said + script.read_text()
    nodes = {
        line.split(" ", 1)[0]: line.split(" ", 1)[1]
        for line in (tmp_path / "apptainer").read_text().splitlines()
    }
    assert len(nodes) == 3 and set(nodes.values()) == {f"{job} 0 our.sif"}
    shutil.rmtree(run_dir)
