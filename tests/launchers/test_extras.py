"""The script that runs what optional packages need, with programs that stand for uv and Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = """#!/bin/bash
echo "uv $*" >>"$HOME/asked"
case "$1 $2" in
  venv*) mkdir -p .venv/extras/bin .venv/extras/lib/python3.12/site-packages
    printf '#!/bin/bash\\necho "$SAYS"\\n' >.venv/extras/bin/python && chmod +x .venv/extras/bin/python ;;
  "pip freeze") echo "numpy==2.0" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the script and an environment without packages."""
    for name in ("launchers", ".venv/lib/python3.12/site-packages", "path"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    shutil.copy(ROOT / "launchers/extras.sh", tmp_path / "launchers")
    (tmp_path / ".venv/.rto-installed").write_text("cpu\n")
    for path, text in (("launchers/setup.sh", "#!/bin/bash\n"), ("path/uv", UV)):
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    return tmp_path


def run(checkout: Path, *command: str, says: str = "") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{checkout / 'path'}:{os.environ['PATH']}", "HOME": str(checkout), "SAYS": says}
    script = ["bash", str(checkout / "launchers/extras.sh"), *command]
    return subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_packages_are_installed_once_over_the_versions_of_the_environment(checkout: Path) -> None:
    assert run(checkout, says="11 passed").returncode == 0
    venv, freeze, install = (checkout / "asked").read_text().splitlines()
    assert venv.endswith("--python .venv/bin/python .venv/extras") and "--exclude-editable" in freeze
    for part in ("loggers.txt", "verifiers.txt", "gguf.txt", "--constraints .venv/extras/constraints.txt"):
        assert part in install
    assert (checkout / ".venv/extras/constraints.txt").read_text() == "numpy==2.0\n"
    under = checkout / ".venv/extras/lib/python3.12/site-packages/under.pth"
    assert f"addsitedir('{checkout}/.venv/lib/python3.12/site-packages')" in under.read_text()
    assert run(checkout, "python", says="a command").stdout == "a command\n"
    assert len((checkout / "asked").read_text().splitlines()) == 3
    (checkout / "requirements/gguf.txt").write_text("gguf==9\n")
    run(checkout, "python")
    assert len((checkout / "asked").read_text().splitlines()) == 6


def test_a_skipped_test_is_an_error(checkout: Path) -> None:
    skipped = run(checkout, says="SKIPPED [1] tests/rewards/test_verifiers.py:32: pip install")
    assert skipped.returncode == 2 and "a test was skipped" in skipped.stderr


def test_reasoning_gym_is_learnt_and_measured_before_and_after(checkout: Path) -> None:
    shutil.copy(ROOT / "launchers/reasoning_gym.sh", checkout / "launchers")
    (checkout / "launchers/extras.sh").write_text('#!/bin/bash\necho "$*" >>"$HOME/asked"\n')
    script = ["bash", str(checkout / "launchers/reasoning_gym.sh"), "made"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(checkout)}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    train, test, model, *stages, report = (checkout / "asked").read_text().splitlines()
    assert "--out made/train.jsonl --size 2000 --seed 1" in train and "--out made/test.jsonl" in test
    assert "--seed 2" in test and model.startswith("rto tokenizer made/train.jsonl --out made/model")
    recipes = "rto launch --ranks 1 launchers/recipes/reasoning_gym/"
    assert stages == [
        f"{recipes}sft.yaml vars.root=made",
        f"{recipes}grpo.yaml vars.root=made",
        f"{recipes}evaluate.yaml vars.root=made vars.system=sft",
        f"{recipes}evaluate.yaml vars.root=made vars.system=grpo",
    ]
    assert report == "rto report made"
