#!/usr/bin/env python
"""Simulates one step of recipes at their real size, a line of a table each: memory of the fullest GPU, seconds a step.

Usage: .venv/bin/python tools/simulate_recipes.py [--rows FILE [--finished]] [RECIPE[:GPUS[:POOL_GPUS]] ...]

Without recipes: all of the GPU folders, on the GPUs that the first lines of each name, those with the fewest layers
first. A recipe takes a quarter to four minutes of a core. What is in FILE already, of a recipe as it is, is not made
again: stopped, it goes on there. With --finished only what FILE has is printed, by folder, and what it lacks is named.
"""

import argparse
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

from rto_megatron.cli.check import split_gpus
from rto_megatron.config.load import load_recipe
from rto_megatron.config.plan import StagePlan
from rto_megatron.planning.gpus import KNOWN_GPUS
from rto_megatron.planning.judgement import judged
from rto_megatron.planning.memory import fullest_bytes, gib
from rto_megatron.planning.shapes import FoundShape
from rto_megatron.planning.whole_step import longest_lengths, time_step
from rto_megatron.platform.device import prepare

RECIPES = Path(__file__).parents[1] / "launchers/recipes"
FOLDERS = ("families", "llama3_8b", "llama3_1_8b", "llama3_70b", "qwen3_30b_a3b")
PHASES = ("score", "update", "optimizer step", "push")
GPU = KNOWN_GPUS["h100"]
ASSUMED = {"llama3_1_8b/rto_32k.yaml": ["dpo=llama-3.1-8b"]}


@dataclass(frozen=True)
class Wanted:
    """A recipe and its GPUs.

    Example:
        Wanted.of("llama3_8b/rto_own_ranks.yaml:8:2")
    """

    recipe: str
    gpus: int
    pool_gpus: int | None

    @classmethod
    def of(cls, text: str) -> "Wanted":
        """As they are written on the command line; GPUs that are not said are those that the recipe's comment names."""
        recipe, *numbers = text.split(":")
        comment = "".join(line for line in (RECIPES / recipe).open() if line.startswith("#"))
        gpus = re.search(r"(\d+) GPUs", comment)
        pool = re.search(r"--pool-gpus (\d+)", comment)
        given = [int(number) for number in numbers]
        return cls(
            recipe,
            given[0] if given else int(gpus[1]) if gpus else 8,
            given[1] if len(given) > 1 else int(pool[1]) if pool else None,
        )

    @property
    def key(self) -> str:
        """Of a row: another text of the recipe is another row."""
        text = (RECIPES / self.recipe).read_bytes()
        return f"{self.recipe}:{self.gpus}:{self.pool_gpus}:{hashlib.sha256(text).hexdigest()[:12]}"


@dataclass(frozen=True)
class Row:
    """What was found of a recipe.

    Example:
        Row("llama3_8b/sft.yaml", 8, 1, {"update": 2**35}, 2**35, 9.8, 12.0, "2026-01-31")
    """

    recipe: str
    gpus: int
    kinds: int  # of ranks, each of which was simulated
    peaks: dict[str, int]  # phase -> bytes of the rank that takes most in it
    formula: int  # bytes of the fullest rank by the closed formulas
    step_s: float  # expected on H100, every sequence as long as the recipe admits
    cpu_s: float
    date: str

    def line(self) -> str:
        """Of the table."""
        peaks = [gib(self.peaks[phase]) if phase in self.peaks else "" for phase in PHASES]
        seconds = f"{self.step_s:,.0f} s" if self.step_s >= 10 else f"{self.step_s:.1f} s"
        cells = [
            f"`{self.recipe}`",
            str(self.gpus),
            *peaks,
            gib(self.formula),
            seconds,
            f"{self.cpu_s:.0f} s",
        ]
        return f"| {' | '.join(cells)} |"


def planned(wanted: Wanted) -> tuple[StagePlan, dict[str, FoundShape], int]:
    """The recipe on its GPUs, the shapes of its models, and the GPUs of its pool."""
    config = load_recipe(RECIPES / wanted.recipe)
    world_size, pool_gpus = split_gpus(config, wanted.gpus, wanted.pool_gpus)
    plan, known = judged(config, world_size, ASSUMED.get(wanted.recipe, []), "")
    return plan, known, pool_gpus


def num_layers(wanted: Wanted) -> int:
    """Of all models, trained ones counted three times: what a simulation takes goes by it."""
    plan, known, _ = planned(wanted)
    read = [role for role in plan.roles if role.shares is None]
    return sum(known[role.name].shape.num_layers * (3 if role.is_trained else 1) for role in read)


def simulate(wanted: Wanted) -> Row:
    """The recipe's row."""
    from rto_megatron.simulation.whole_job import simulate_job

    plan, known, pool_gpus = planned(wanted)
    shapes = {name: found.shape for name, found in known.items()}
    time = time_step(plan, shapes, GPU, pool_gpus, longest_lengths(plan))
    ranks = simulate_job(plan, shapes)
    peaks: dict[str, int] = {}
    for phase in (phase for rank in ranks for phase in rank.phases):
        peaks[phase.name] = max(phase.peak, peaks.get(phase.name, 0))
    cpu_s = sum(rank.seconds for rank in ranks)
    today = datetime.now(UTC).date().isoformat()
    formula = fullest_bytes(plan, known)
    return Row(wanted.recipe, wanted.gpus, len(ranks), peaks, formula, time.seconds, cpu_s, today)


def known_rows(file: Path | None) -> dict[str, Row]:
    """Key -> row, of those that are finished; what a kill cut short is not."""
    found = {}
    for line in file.read_text().splitlines() if file is not None and file.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["key"]] = Row(**entry["row"])
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipes", nargs="*", help="under launchers/recipes, with GPUs and those of the pool behind colons"
    )
    parser.add_argument("--rows", type=Path, help="a file of finished rows: read first, then added to")
    parser.add_argument("--finished", action="store_true", help="simulate nothing")
    given = parser.parse_args()
    prepare()
    every = [
        str(path.relative_to(RECIPES)) for one in FOLDERS for path in sorted((RECIPES / one).glob("*.yaml"))
    ]
    names = ["recipe", "GPUs", *PHASES, "`rto check`", f"a step on {GPU.name.upper()}", "simulated in"]
    print(f"| {' | '.join(names)} |")
    print("|" + "---|" * len(names))
    finished = known_rows(given.rows)
    all_wanted = [Wanted.of(text) for text in given.recipes or every]
    if not given.recipes and not given.finished:
        all_wanted.sort(key=num_layers)
    for wanted in all_wanted:
        row = finished.get(wanted.key)
        if row is None and given.finished:
            continue
        if row is None:
            row = simulate(wanted)
            if given.rows is not None:
                with given.rows.open("a") as file:
                    file.write("\n" + json.dumps({"key": wanted.key, "row": asdict(row)}) + "\n")
        print(row.line(), flush=True)
    if missing := [one.recipe for one in all_wanted if given.finished and one.key not in finished]:
        print(f"\nnot simulated: {', '.join(missing)}")


if __name__ == "__main__":
    main()
