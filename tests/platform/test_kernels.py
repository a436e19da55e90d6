"""What a process computes with: torch means torch, and TransformerEngine is refused where it cannot be used."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rto_megatron.errors import MachineError
from rto_megatron.platform import kernels

REPOSITORY = Path(__file__).parents[2]


def _install(folder: Path, version: str, code: str) -> None:
    (folder / "transformer_engine" / "pytorch").mkdir(parents=True)
    (folder / "transformer_engine" / "__init__.py").touch()
    (folder / "transformer_engine" / "pytorch" / "__init__.py").write_text(code)
    record = folder / f"transformer_engine-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {version}\n")


def _fresh(program: str, *folders: Path) -> str:
    """What a process of its own prints."""
    path = os.pathsep.join(map(str, (REPOSITORY, *folders)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return process.stdout + process.stderr


def test_megatron_finds_neither_transformer_engine_nor_apex_that_is_installed(tmp_path: Path) -> None:
    _install(tmp_path, "2.20.2", "print('TransformerEngine is imported')")
    (tmp_path / "apex" / "multi_tensor_apply").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("print('apex is imported')")
    program = (
        "import torch; from rto_megatron.platform.device import prepare; kernels = prepare().kernels;"
        "assert kernels == prepare().kernels == 'torch', kernels;"
        "from megatron.core import optimizer; from megatron.core.transformer.moe import moe_utils;"
        "from megatron.core.optimizer import clip_grads; from megatron.core.utils import local_multi_tensor_applier;"
        "assert optimizer.Adam is torch.optim.AdamW and moe_utils.te_general_gemm is None;"
        "assert clip_grads.multi_tensor_applier is local_multi_tensor_applier"
    )
    assert _fresh(program, tmp_path) == ""


@pytest.mark.parametrize(
    ("version", "code", "has_gpu", "told"),
    [
        ("2.19.1", "", True, r"TransformerEngine 2\.19\.1 is installed, expected 2\.20\.\*.*install_gpu\.sh"),
        ("2.20.2", "", False, "torch sees no GPU"),
        ("2.20.2", "raise OSError('undefined symbol: _ZN3c105')", True, "another torch than .*install_gpu"),
        ("2.20.2", "import transformer_engine_torch", True, "part for torch is missing"),
    ],
)
def test_another_build_is_refused(
    version: str, code: str, has_gpu: bool, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(tmp_path, version, code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)  # hidden since the tests began
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    problem = kernels.engine_problem()
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    kernels.choose(None)  # hides it again
    assert problem is not None and re.search(told, problem), problem


def test_a_recipe_that_asks_for_it_is_told_what_is_missing() -> None:
    program = (
        "from rto_megatron.config.training import FrozenPrecisionConfig as Precision;"
        "from rto_megatron.errors import MachineError; from rto_megatron.platform.device import prepare\n"
        "try: prepare(Precision(kernels='transformer_engine'))\n"
        "except MachineError as error: print(error)\n"
        "print(prepare(Precision(kernels='auto')).kernels)"
    )
    told, auto = _fresh(program).splitlines()
    assert told.startswith("precision.kernels=transformer_engine, and TransformerEngine is not installed; ")
    assert auto == "torch"


def test_a_gpu_without_products_in_8_bits_is_refused_by_its_name() -> None:
    kernels.require_fp8("NVIDIA H100", (9, 0))
    with pytest.raises(
        MachineError, match=r"NVIDIA A100 \(compute capability 8\.0\) has no products in 8 bits"
    ):
        kernels.require_fp8("NVIDIA A100", (8, 0))
