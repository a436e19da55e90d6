"""The additions that docs/extending.md shows: each diff applies, and the command below it passes on what came of it."""

import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass

import pytest
from test_house import ROOT

COPIED = ("rto_megatron", "tests", "tools", "launchers", "docs", "pyproject.toml")


@dataclass(frozen=True)
class Addition:
    """One section of the page."""

    title: str
    diff: str
    files: tuple[str, ...]
    chosen: str  # by pytest's -k


def additions() -> list[Addition]:
    found = []
    for section in (ROOT / "docs/extending.md").read_text().split("\n## ")[1:]:
        (diff,) = re.findall(r"```diff\n(.*?)```", section, re.DOTALL)
        ((files, chosen),) = re.findall(r"-m pytest (.*) -k (.*)", section)
        title = section.splitlines()[0]
        found.append(Addition(title, diff, tuple(files.split()), chosen.strip('"')))
    return found


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Test -> whether it passed, of all commands of the page in one process: to import torch is the expensive part."""
    copy = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    for addition in additions():
        subprocess.run(["git", "apply", "-"], input=addition.diff, text=True, cwd=copy, check=True)
    # Sorted: pytest forgets the fixtures of a folder that it comes back to.
    files = sorted({file for addition in additions() for file in addition.files})
    chosen = " or ".join(f"({addition.chosen})" for addition in additions())
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--junitxml=run.xml",
    ]
    with (copy / "run.log").open("w") as log:
        subprocess.run(
            [*command, *files, "-k", chosen], cwd=copy, stdout=log, stderr=log, timeout=300, check=False
        )
    print((copy / "run.log").read_text()[-6000:])
    return {
        f"{case.get('classname')}::{case.get('name')}": len(case) == 0
        for case in ET.parse(copy / "run.xml").iter("testcase")
    }


@pytest.mark.parametrize("addition", additions(), ids=lambda addition: addition.title)
def test_an_addition_passes_its_tests(addition: Addition, tested: dict[str, bool]) -> None:
    word = addition.chosen.split()[0]
    own = {name: is_passed for name, is_passed in tested.items() if word in name}
    assert own and all(own.values()), own
