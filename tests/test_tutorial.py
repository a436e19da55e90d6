"""docs/tutorial.md: its recipes load, and all of it runs in order in a fresh folder."""

import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from test_house import ROOT

from rto_megatron.config.load import load_recipe

RECIPES = sorted((ROOT / "launchers/recipes/tutorial").glob("*.yaml"))
# The rule of the small budget: each stage makes a quarter of its recipe's steps; nothing else is changed.
SHARE_OF_STEPS = 4
LIMIT_S = 1500


def script() -> str:
    """What a reader pastes: the blocks of commands, one after another."""
    page = (ROOT / "docs/tutorial.md").read_text()
    return "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL))


def rto_commands() -> list[list[str]]:
    """Arguments of each `rto`, as far as bash leaves them."""
    without_files = re.sub(r"<<'END'.*?^END$", "", script(), flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip().removesuffix("&") for line in without_files.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("rto ")]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_page_names_every_recipe_and_its_keys_are_keys(recipe: Path) -> None:
    given = [one for one in rto_commands() if one[0] == "launch" and one[1].endswith(f"/{recipe.name}")]
    assert given, recipe
    (answers,) = re.findall(r"^answers=\((.*)\)$", script(), re.MULTILINE)
    for arguments in given:
        overrides = [word for word in arguments[2:] if "=" in word and "$" not in word]
        extended = shlex.split(answers) if "${answers[@]}" in arguments else []
        load_recipe(recipe, [*overrides, *extended])


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone that has its environment, with recipes of fewer steps."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for path in (*ROOT.glob("[!.]*"), ROOT / ".venv"):
        if path.name not in ("launchers", "runs"):
            (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "launchers", folder / "launchers")
    for recipe in (folder / "launchers/recipes/tutorial").glob("*.yaml"):
        small = re.sub(
            r"(?<=  steps: )\d+", lambda found: str(int(found[0]) // SHARE_OF_STEPS), recipe.read_text()
        )
        recipe.write_text(small)
    return folder


@pytest.mark.slow
@pytest.mark.pool
def test_all_of_the_page_runs_in_order(clone: Path) -> None:
    with (clone.parent / "printed").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"set -em\n{script()}"],  # -m: jobs as in a reader's bash, `%1` among them
            cwd=clone,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            process.wait(LIMIT_S)
        finally:
            end_session(process.pid)
    printed = (clone.parent / "printed").read_text()
    assert process.returncode == 0, printed[-6000:]
    run = clone / "runs/tutorial"
    assert "rto: 7 steps done" in printed and "stopped with status 85" in printed
    assert "100 answers" in printed and " pairs, 0.0% with the worse response chosen" in printed
    assert len((run / "rto/metrics.jsonl").read_text().splitlines()) == 7
    assert all(
        (run / "evaluations" / system / "evaluation.json").is_file() for system in ("sft", "dpo", "rto")
    )
    assert (run / "view.html").stat().st_size > 10_000
    assert (run / "rto/hf/config.json").is_file()


def end_session(leader: int) -> None:
    """Ends what is left of a bash and its jobs, which have groups of their own."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[3]) == leader:
            os.kill(int(status.parent.name), signal.SIGTERM)
