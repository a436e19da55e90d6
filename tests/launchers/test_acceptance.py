"""The acceptance script on the CPU: its cheap checks for real, and a table that tells of a failure."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def acceptance(root: Path, checks: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "launchers/acceptance.sh", "--only", checks, "--root", str(root)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def row(shown: subprocess.CompletedProcess[str], title: str) -> str:
    (line,) = [line for line in shown.stdout.splitlines() if title in line and " s  " in line]
    return line


@pytest.mark.slow
def test_layouts_pass_over_gloo(tmp_path: Path) -> None:
    shown = acceptance(tmp_path, "parity")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    parity = row(shown, "an RTO step at TP, PP and DP")
    assert parity.startswith("pass")
    assert all(layout in parity for layout in ("dp2", "tp2", "tp2_sp", "pp2"))


@pytest.mark.slow
def test_collectives_pass_over_gloo_and_absent_kernels_are_skipped(tmp_path: Path) -> None:
    shown = acceptance(tmp_path, "collectives,kernels")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert row(shown, "collectives").startswith("pass")
    assert "2 ranks, gloo, all_reduce" in row(shown, "collectives")
    assert row(shown, "TransformerEngine").startswith("skipped")
    assert "no GPU" in row(shown, "TransformerEngine")


@pytest.mark.slow
def test_a_check_that_hangs_fails_in_the_table(tmp_path: Path) -> None:
    shown = acceptance(tmp_path, "collectives", LIMIT_S="0.2")
    assert shown.returncode == 1
    line = row(shown, "collectives")
    assert line.startswith("FAIL") and f"see {tmp_path}/acceptance/logs/collectives.log" in line
    assert "1 failed" in shown.stdout


def test_an_unknown_check_is_refused(tmp_path: Path) -> None:
    refused = acceptance(tmp_path, "speed")
    assert refused.returncode == 2
    assert "--only speed: there is no such check" in refused.stderr
