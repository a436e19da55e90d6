"""The set-up script on machines that lack something: it finds what works, or says in one sentence what is missing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OFFLINE = {"PIP_NO_INDEX": "1", "UV_OFFLINE": "1"}
FAILING = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the script reads, and a `bin` folder for programs that pretend."""
    folder = tmp_path / "checkout"
    for name in ("launchers", "requirements"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "bin").mkdir()
    (folder / "home").mkdir()
    return folder


def program(checkout: Path, name: str, text: str) -> None:
    path = checkout / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def setup(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script; `bin` hides the machine's Python, uv, compiler and GPU, and nothing is fetched."""
    for name in ("python3.12", "python3", "python", "uv", "nvidia-smi"):
        if not (checkout / "bin" / name).exists():
            program(checkout, name, FAILING)
    tools = (
        "bash",
        "sh",
        "cat",
        "cksum",
        "awk",
        "sed",
        "grep",
        "mkdir",
        "rm",
        "dirname",
        "env",
        "df",
        "echo",
        "true",
    )
    for tool in tools:
        found = shutil.which(tool)
        if found and not (checkout / "bin" / tool).exists():
            (checkout / "bin" / tool).symlink_to(found)
    return subprocess.run(
        ["bash", "launchers/setup.sh"],
        cwd=checkout,
        env={"PATH": str(checkout / "bin"), "HOME": str(checkout / "home"), **OFFLINE, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# A uv that makes the folders a real one would make, and notes what it was asked.
PRETENDING_UV = """#!/bin/sh
echo "$@" >>"$HOME/asked"
[ "$1" = --version ] && exit 0
if [ "$1" = venv ]; then
  for folder; do :; done
  mkdir -p "$folder/bin" "$folder/lib"
  printf '#!/bin/sh\\nexit 0\\n' >"$folder/bin/python"
  /bin/chmod +x "$folder/bin/python"
fi
"""
PYTHON312 = "#!/bin/sh\nexit 0\n"  # says yes to every question about its version


def test_a_python_shim_that_fails_is_passed_over_for_one_in_the_versions_of_pyenv(checkout: Path) -> None:
    program(checkout, "uv", PRETENDING_UV)
    real = checkout / "home" / ".pyenv" / "versions" / "3.12.9" / "bin" / "python"
    real.parent.mkdir(parents=True)
    real.write_text(PYTHON312)
    real.chmod(0o755)
    done = setup(checkout)
    assert done.returncode == 0, done.stderr
    assert f"--python {real}" in (checkout / "home" / "asked").read_text()


def test_without_python_uv_is_asked_to_fetch_one(checkout: Path) -> None:
    program(checkout, "uv", PRETENDING_UV)
    done = setup(checkout, PYENV_ROOT="/nowhere", RTO_PYTHON="/nowhere/python")
    if "No working Python 3.12" not in done.stdout:
        pytest.skip("this machine has Python 3.12 in a system folder, which the script rightly takes")
    assert "venv --quiet --allow-existing --python 3.12 .venv" in (checkout / "home" / "asked").read_text()


def test_second_run_does_nothing_until_a_requirement_changes(checkout: Path) -> None:
    program(checkout, "uv", PRETENDING_UV)
    program(checkout, "python3.12", PYTHON312)
    assert "Setting up" in setup(checkout).stdout
    assert setup(checkout).stdout == ""
    with (checkout / "requirements.txt").open("a") as file:
        file.write("another==1.0\n")
    assert "Setting up" in setup(checkout).stdout


def test_list_of_packages_is_left_out_of_a_log_and_messages_are_kept(checkout: Path) -> None:
    listing = (
        '[ "$1" = pip ] && echo "Installed 190 packages in 3s" >&2 && echo " + torch==2.13.0" >&2\nexit 0\n'
    )
    program(checkout, "uv", PRETENDING_UV + listing)
    program(checkout, "python3.12", PYTHON312)
    done = setup(checkout)
    assert done.returncode == 0
    first_install = done.stderr.split("Installed 190 packages in 3s")
    assert len(first_install) == 3, done.stderr  # the requirements, then the package itself
    assert "torch" not in first_install[1].split("\n")[1]


def test_the_other_vllm_build_gets_a_fresh_environment(checkout: Path) -> None:
    program(checkout, "uv", PRETENDING_UV)
    program(checkout, "python3.12", PYTHON312)
    program(checkout, "gcc", "#!/bin/sh\nexit 0\n")
    assert setup(checkout, RTO_VARIANT="gpu").returncode == 0
    left = checkout / ".venv" / "lib" / "vllm"
    left.mkdir()
    assert setup(checkout, RTO_VARIANT="cpu").returncode == 0
    assert not left.exists()


def test_gpu_machine_gets_the_cuda_build_and_needs_a_compiler(checkout: Path) -> None:
    program(checkout, "uv", PRETENDING_UV)
    program(checkout, "python3.12", PYTHON312)
    program(checkout, "nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA'\n")
    refused = setup(checkout)
    assert refused.returncode == 2
    assert "no C compiler (cc, gcc)" in refused.stderr
    program(checkout, "gcc", "#!/bin/sh\nexit 0\n")
    assert setup(checkout).returncode == 0
    assert "-r requirements/gpu.txt" in (checkout / "home" / "asked").read_text()


def test_full_disk_is_told_before_anything_is_fetched(checkout: Path) -> None:
    program(checkout, "uv", PRETENDING_UV)
    program(checkout, "df", "#!/bin/sh\necho h\necho '/dev/x 100 100 3145728 1% /'\n")
    refused = setup(checkout)
    assert refused.returncode == 2
    assert "has 3 GiB free and the environment needs 12" in refused.stderr
    assert not (checkout / "home" / "asked").exists()


def test_failed_fetch_speaks_of_the_network_and_leaves_no_finished_mark(checkout: Path) -> None:
    program(
        checkout,
        "uv",
        PRETENDING_UV + '[ "$1" = pip ] && { echo "error: Failed to fetch" >&2; exit 1; }\nexit 0\n',
    )
    program(checkout, "python3.12", PYTHON312)
    refused = setup(checkout)
    assert refused.returncode == 2
    assert "this machine has no network" in refused.stderr
    assert "Setting up" in setup(checkout).stdout


def test_missing_uv_that_cannot_be_installed_is_one_sentence(checkout: Path) -> None:
    refused = setup(checkout, PYENV_ROOT="/nowhere")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: uv is missing and could not be installed")


def test_scripts_are_executable_and_parse() -> None:
    for script in [*(ROOT / "launchers").glob("*.sh"), ROOT / ".ci" / "run"]:
        assert os.access(script, os.X_OK), script
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0, script
