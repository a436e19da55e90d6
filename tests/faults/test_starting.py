"""Before the first step: ranks that do not come are named in time, and a run that is told to stop then ends at once."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from faults.launched import ROOT
from ranks import free_port, run_ranks
from trainer.tiny_runs import configure
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.launching.torchrun import refuse_several_machines, torchrun_defaults
from rto_megatron.parallel.meeting import AbsentRanks, join_ranks


def test_ranks_that_do_not_come_are_named() -> None:
    def said() -> tuple[str, str]:
        os.environ["WORLD_SIZE"] = "4"
        with pytest.raises(AbsentRanks) as refused:
            join_ranks("gloo", timedelta(seconds=60), limit_s=1.0)
        return refused.value.reason, str(refused.value)

    for reason, text in run_ranks(2, said):
        assert reason == "INFRA_LOST_RANK"
        assert text.startswith("ranks 2, 3 of 4 did not come to 127.0.0.1:")


def test_a_meeting_point_that_nobody_keeps_is_named() -> None:
    def said() -> str:
        os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_PORT=str(free_port()))
        with pytest.raises(AbsentRanks) as refused:
            join_ranks("gloo", timedelta(seconds=60), limit_s=1.0)
        return str(refused.value)

    (text,) = run_ranks(1, said)
    assert text.startswith("rank 1 on ") and "has no meeting point at 127.0.0.1:" in text


def test_a_rank_that_waits_for_another_ends_with_a_signal(files: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(yaml.safe_dump(configure("sft", files, tmp_path / "run").model_dump(mode="json")))
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = subprocess.Popen(
        [sys.executable, "-m", "rto_megatron.cli.main", "train", str(recipe)],
        cwd=ROOT,
        env={**os.environ, **alone, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with contextlib.closing(socket.socket()) as caller:
        while caller.connect_ex(("127.0.0.1", int(alone["MASTER_PORT"]))):  # until it keeps the meeting point
            assert process.poll() is None
            time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 85, said
    assert "told to stop after step 0, while the run was starting" in said


@pytest.mark.parametrize("nodes", ["2", "1:4"])
def test_a_launch_among_several_machines_is_refused(
    nodes: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubeflow's operator sets torchrun's defaults in each container, and each would train by itself."""
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(yaml.safe_dump(configure("sft", files, tmp_path / "run").model_dump(mode="json")))
    monkeypatch.setenv("PET_NNODES", nodes)
    ended = CliRunner().invoke(app, ["launch", str(recipe)])
    assert f"PET_NNODES={nodes} says that this is one of several machines" in str(ended.exception)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("PET_NNODES", "1")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "master-0:23456")
    assert refuse_several_machines(str(recipe)) == ["PET_NNODES", "PET_RDZV_ENDPOINT"]
    assert torchrun_defaults() == {"PET_NNODES": "1", "PET_RDZV_ENDPOINT": "master-0:23456"}
