"""Every numbered patch is needed: without it the job of patch_probe.py fails at the call site it names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the patches of cpu.py do nothing with CUDA"
)
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    probe = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("patch_probe.py"))],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert probe.returncode == 0, probe.stderr
    return json.loads(probe.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("train spread", "trained"),
        ("train stages", "trained"),
        ("train mixture", "trained"),
        ("train experts cut", "trained"),
        ("resume sharded", "resumed"),
        ("resume at 0", "resumed"),
        ("generator", "kept"),
    ],
)
def test_with_all_patches_the_job_runs(outcomes, scenario, expected):
    assert outcomes[scenario] == expected


@pytest.mark.parametrize(
    ("patch", "failure"),
    [
        ("P1", "distributed/param_and_grad_buffer.py"),
        ("P2", "pipeline_parallel/p2p_communication.py"),
        ("P3", "in start_grad_sync"),
        ("P4", "tensor_parallel/random.py"),
        ("P5", "optimizer/optimizer.py"),
        ("P6", "in get_parameter_state_dp_zero"),
        ("P7", "in clip_grad_by_total_norm_fp32"),
        ("P8", "the tracker's seed was ignored"),
        ("P9", "moe/token_dispatcher.py"),
        ("P12", "tensor_parallel/mappings.py"),
        ("P13", "in _gather_along_first_dim"),
        ("O1", "in _set_main_param_and_optimizer_states KeyError: 'step'"),
        ("O2", "resumed weights differ"),
        ("O3", "in load_state_dict KeyError: 'step'"),
        ("W1", "saving started a process"),
    ],
)
def test_without_one_patch_the_job_fails(outcomes, patch, failure):
    assert outcomes[patch].startswith("FAILED")
    assert failure in outcomes[patch]


@pytest.mark.parametrize(("patch", "place"), [("S1", "metadata"), ("S2", "bytes")])
def test_code_in_a_checkpoint_runs_only_without_the_patch(outcomes, patch, place):
    assert outcomes[patch].startswith("ran")
    assert outcomes[place].startswith("refused")
    assert "posix.mknod" in outcomes[place]


def test_inductor_is_loaded_when_a_compiled_function_is_called_and_not_before():
    program = (
        "import sys; from rto_megatron.platform.device import prepare; prepare()\n"
        "import torch, megatron.core.models.gpt\n"
        "loaded = lambda: 'torch._inductor.compile_fx' in sys.modules\n"
        "before = loaded(); torch._dynamo.config.disable = True\n"
        "twice = torch.compile(lambda x: 2 * x, dynamic=False)\n"
        "print(before, loaded(), twice(3), loaded())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["False", "False", "6", "True"], done.stderr
