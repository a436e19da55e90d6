"""One device for every test here: a CUDA GPU, or the CPU where RTO_GPU_TESTS_ON=cpu asks for it.

World size 1, in this process: once CUDA has started nothing may be forked, so these tests run on their own
(launchers/test_gpu.sh). On the CPU they prove only that their bodies are right.
"""

import os

# cuBLAS reads it once, before its first product; without it a deterministic backward pass is refused.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from gpu.roles import ROLES, HfModel, Prepared, prepare_update, write_model
from ranks import free_port

from rto_megatron.config.training import ParallelConfig
from rto_megatron.data.packing import Layout
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.device import prepare

VARIABLE = "RTO_GPU_TESTS_ON"
_used: list[str] = []


@pytest.fixture(scope="session")
def place() -> Iterator[Topology]:
    """The one rank, on the device under test."""
    wants_cpu = os.environ.get(VARIABLE) == "cpu"
    if wants_cpu and torch.cuda.is_available():
        pytest.fail(
            f"{VARIABLE}=cpu needs CUDA_VISIBLE_DEVICES= too: where torch sees a GPU it is used", False
        )
    if not wants_cpu and not torch.cuda.is_available():
        pytest.skip(f"no CUDA device; {VARIABLE}=cpu runs the same bodies on the CPU")
    torch.set_float32_matmul_precision("highest")
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**launcher, **rank}.items():
            patch.setenv(name, value)
        device = prepare()
        _used.append(
            f"{_device_name(device.torch_device)}, {device.backend}, layers of {device.kernels}, {_adam()}"
        )
        yield Topology.init(device, ParallelConfig(), seed=1)
        dist.destroy_process_group()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU (proves no kernel)"


def _adam() -> str:
    from megatron.core import optimizer

    return f"Adam of {optimizer.Adam.__module__}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says where the tests ran, at every verbosity."""
    for device in _used:
        terminalreporter.write_line(f"tests/gpu ran on: {device}; torch {torch.__version__}")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HfModel]:
    """Role -> tiny float32 Hugging Face model in a folder."""
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, role) for name, role in ROLES.items()}


@pytest.fixture(scope="session")
def layout(place: Topology) -> Layout:
    """Two packed sequences per micro-batch."""
    return Layout(2, True, 1, place.device.torch_device)


@pytest.fixture(scope="session")
def prepared(place: Topology, models: dict[str, HfModel], layout: Layout) -> Prepared:
    """All roles in float32, never stepped, and the experience that they gave the fixed rollouts."""
    return prepare_update(place, models, layout)


@pytest.fixture
def is_deterministic() -> Iterator[None]:
    """Sums in a fixed order; memory that nobody wrote reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
