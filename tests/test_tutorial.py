"""docs/tutorial.md: its commands are commands, its recipes load, and all of it runs in order in a fresh folder."""

import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import typer
from test_house import ROOT
from typer.testing import CliRunner

from rto_megatron.cli.main import app
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


def usage_error(arguments: list[str]) -> str | None:
    """What the program has against the arguments, which it reads and does not act upon."""
    place, rest, names = typer.main.get_command(app), list(arguments), "rto"
    while rest and (found := getattr(place, "commands", {}).get(rest[0])) is not None:
        place, names, rest = found, f"{names} {rest[0]}", rest[1:]
    try:
        place.make_context(names, rest)
    except Exception as error:  # of click or of typer's copy of it
        return f"{names}: {error!r}"
    return None


def test_every_command_of_the_page_is_one_with_these_options() -> None:
    commands = rto_commands()
    assert [problem for one in commands if (problem := usage_error(one)) is not None] == []
    used = {one[0] for one in commands}
    assert used == {"tokenizer", "data", "check", "launch", "pool", "rollouts", "view", "report"}
    assert usage_error(["data", "pairs", "--nothing"]) is not None
    assert CliRunner().invoke(app, ["data", "rate", "--help"]).exit_code == 0


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
