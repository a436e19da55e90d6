"""The script that installs the GPU stack, on machines that pretend: what it would run, and what it refuses."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launchers" / "install_gpu.sh"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A PATH with the tools that the script calls, and programs that a test adds."""
    for tool in ("bash", "env", "dirname", "sed", "head", "awk", "grep", "nproc", "g++", "git", "readlink"):
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / tool).symlink_to(found)
    return tmp_path


def program(machine: Path, name: str, says: str) -> None:
    (machine / name).write_text(f"#!{shutil.which('bash')}\necho '{says}'\n")
    (machine / name).chmod(0o755)


def install(machine: Path, *arguments: str, names_toolkit: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(machine), "HOME": os.environ.get("HOME", "/"), "MAX_JOBS": "3"}
    if names_toolkit:
        environment["CUDA_HOME"] = str(machine / "cuda")
    command = [str(machine / "bash"), str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def with_toolkit(machine: Path, driver: str = "590.44", cuda: str = "13.0") -> None:
    program(machine, "nvidia-smi", driver)
    (machine / "cuda" / "bin").mkdir(parents=True)
    (machine / "cuda" / "include").mkdir()
    (machine / "cuda" / "include" / "cuda_runtime.h").touch()
    program(machine / "cuda" / "bin", "nvcc", f"Cuda compilation tools, release {cuda}, V{cuda}.88")


def test_a_dry_run_prints_every_command_with_the_pins(machine: Path) -> None:
    with_toolkit(machine)
    shown = install(machine, "--with-apex", "--dry-run")
    assert (shown.returncode, shown.stderr) == (0, "")
    stack, tools, engine, apex, doctor = shown.stdout.splitlines()
    assert stack.endswith("RTO_VARIANT=gpu bash launchers/setup.sh")
    assert tools.endswith("wheel packaging ninja")
    assert f"CUDA_HOME={machine / 'cuda'} MAX_JOBS=3" in engine and "NVTE_PYTORCH_FORCE_BUILD=TRUE" in engine
    pinned = next(
        line for line in (ROOT / "requirements/gpu-extras.txt").read_text().splitlines() if line[0] != "#"
    )
    assert pinned in engine.replace("\\", "") and "--no-build-isolation" in engine
    headers = next(word for word in engine.split() if word.startswith("CPATH="))
    assert [path.split("/nvidia/")[1] for path in headers.split(":")] == [
        "cudnn/include", "nccl/include", "cu13/include",
    ]  # fmt: skip
    assert "git+https://github.com/NVIDIA/apex@" in apex and "APEX_CUDA_EXT=1" in apex
    assert doctor.endswith("rto doctor")
    assert "apex" not in install(machine, "--dry-run").stdout


@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [("570.10", "13.0", "the driver is 570.10"), ("590.44", "12.8", "nvcc is of CUDA 12.8")],
)
def test_another_cuda_is_refused(driver: str, cuda: str, said: str, machine: Path) -> None:
    with_toolkit(machine, driver, cuda)
    refused = install(machine)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert said in refused.stderr


def test_a_machine_without_gpu_compiler_and_toolkit_is_told_all_of_it_by_a_dry_run(machine: Path) -> None:
    (machine / "g++").unlink()
    assert "nvidia-smi shows no GPU" in install(machine).stderr
    shown = install(machine, "--dry-run")
    assert len(shown.stderr.splitlines()) == 3
    for missing in ("no GPU", f"no nvcc at {machine / 'cuda/bin/nvcc'}", "no C++ compiler (g++)"):
        assert missing in shown.stderr


def test_an_image_is_built_where_no_gpu_is(machine: Path) -> None:
    with_toolkit(machine)
    (machine / "nvidia-smi").unlink()
    assert install(machine, "--for-image", "--dry-run").stderr == ""


def test_a_toolkit_is_found_behind_a_link_and_not_beside_a_script(machine: Path) -> None:
    with_toolkit(machine)
    (machine / "nvcc").symlink_to(machine / "cuda" / "bin" / "nvcc")
    shown = install(machine, "--dry-run", names_toolkit=False)
    assert shown.stderr == "" and f"CUDA_HOME={machine / 'cuda'} " in shown.stdout
    (machine / "nvcc").unlink()
    program(machine, "nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    assert "CUDA_HOME=/usr/local/cuda " in install(machine, "--dry-run", names_toolkit=False).stdout


def test_a_toolkit_without_the_headers_of_the_runtime_is_told(machine: Path) -> None:
    with_toolkit(machine)
    (machine / "cuda" / "include" / "cuda_runtime.h").unlink()
    refused = install(machine)
    assert refused.returncode == 2 and f"no cuda_runtime.h in {machine / 'cuda/include'}" in refused.stderr
