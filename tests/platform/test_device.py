"""The device of a rank, what is said on import, and packages named apex that megatron-core cannot use."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rto_megatron.errors import MachineError
from rto_megatron.platform.device import prepare, require_usable_apex

REPOSITORY = Path(__file__).parents[2]


def _install(folder: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_the_device_is_the_cpu_and_ranks_talk_over_gloo():
    device = prepare()
    assert (device.torch_device, device.backend, device.is_cuda) == (torch.device("cpu"), "gloo", False)
    assert prepare() == device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_with_cuda_the_device_is_the_local_rank():
    device = prepare()
    assert (device.torch_device, device.backend) == (torch.device("cuda", 0), "nccl")
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_one_queue_is_asked_for_before_the_driver_is_woken(monkeypatch):
    found = []
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)

    def wake() -> bool:
        found.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
        return False

    monkeypatch.setattr(torch.cuda, "is_available", wake)
    prepare()
    assert found and set(found) == {"1"}


def test_the_web_toolkit_named_apex_is_refused(tmp_path, monkeypatch):
    _install(tmp_path, "apex", monkeypatch)
    with pytest.raises(MachineError, match="not NVIDIA's"):
        require_usable_apex()


def test_nvidia_apex_is_accepted(tmp_path, monkeypatch):
    _install(tmp_path, "apex", monkeypatch)
    (tmp_path / "apex" / "multi_tensor_apply").mkdir()
    require_usable_apex()


def test_importing_megatron_says_nothing():
    program = (
        "from rto_megatron.platform.device import prepare; prepare(); "
        "import megatron.core.models.gpt, megatron.core.optimizer, megatron.core.dist_checkpointing"
    )
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert process.stdout + process.stderr == ""
