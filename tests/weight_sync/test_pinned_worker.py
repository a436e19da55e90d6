"""VLLM_BATCH_INVARIANT pins NCCL's variables in vLLM's workers; a group shared with the trainer must not have them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.pool
HERE = Path(__file__).parent


def test_a_worker_joins_a_push_with_the_trainers_nccl_variables() -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent))),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [sys.executable, str(HERE / "pinned_worker.py")]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    joined, afterwards = json.loads(done.stdout.splitlines()[-1])
    assert joined == {"NCCL_PROTO": None, "NCCL_NTHREADS": "256"}
    assert afterwards == {"NCCL_PROTO": "Simple", "NCCL_NTHREADS": "1"}  # for vLLM's own
