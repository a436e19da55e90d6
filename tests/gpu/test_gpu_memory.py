"""On one GPU: what a simulated step takes of its memory is what torch's allocator gives out in the same step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rto_megatron.parallel.topology import Topology

pytestmark = pytest.mark.gpu
PROGRAM = Path(__file__).parent / "step_memory.py"


def _told(how: str, size: int, **variables: str) -> dict[str, dict[str, int]]:
    """In a process of its own: the simulation sees no GPU and forks, and both have a process group of their own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    command = [sys.executable, str(PROGRAM), how, str(size)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_simulated_memory_is_what_the_allocator_gives(place: Topology) -> None:
    size = (
        1024 if place.device.is_cuda else 128
    )  # large enough that what kernels take for themselves is little
    simulated = _told("simulated", size, CUDA_VISIBLE_DEVICES="")
    measured = _told("measured", size)
    for phase, peak in measured["peaks"].items():
        print(
            f"{phase}: {simulated['peaks'][phase] / peak:.4f} of the {peak / 2**20:,.0f} MiB that were measured"
        )
    assert simulated["held"] == measured["held"]
    assert simulated["peaks"] == pytest.approx(measured["peaks"], rel=0.05)
