"""The scripts of experiments show their usage where they are given an option, and make nothing."""

import subprocess
from pathlib import Path

import pytest
from launchers.pretending import pretending_checkout


@pytest.mark.parametrize("name", ["ahead", "language", "sample_efficiency"])
def test_an_option_is_not_taken_for_a_folder(name: str, tmp_path: Path) -> None:
    script = pretending_checkout(tmp_path) / f"launchers/experiments/{name}.sh"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "FAILS": "", "HANGS": "none"}
    shown = subprocess.run(
        ["bash", script, "--help"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 2 and not (tmp_path / "asked").exists()
    header = [line[2:] for line in script.read_text().splitlines() if line.startswith("# ")]
    told = shown.stdout.splitlines()
    assert told == header[: len(told)] and any(line.startswith("Usage:") for line in told)
    assert "set -euo pipefail" in script.read_text().splitlines()[len(told) + 1]
