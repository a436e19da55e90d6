#!/usr/bin/env python
"""Simulates one step of recipes at their real size, a line of a table each: memory of the fullest GPU by phase.

Usage: .venv/bin/python tools/simulate_recipes.py [RECIPE[:GPUS[:POOL_GPUS]] ...]

Without arguments: the recipes of the GPU folders whose models and layouts differ, on the GPUs that they name. A recipe
takes one or two minutes of a core.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

from rto_megatron.cli.check import split_gpus
from rto_megatron.config.load import load_recipe
from rto_megatron.planning.judgement import judged
from rto_megatron.planning.memory import fullest_bytes, gib
from rto_megatron.platform.device import prepare

RECIPES = Path(__file__).parents[1] / "launchers/recipes"
PHASES = ("score", "update", "optimizer step", "push")
DISTINCT = (
    "llama3_8b/sft.yaml:8",
    "llama3_8b/reward_model.yaml:8",
    "llama3_8b/dpo.yaml:8",
    "llama3_8b/grpo.yaml:8",
    "llama3_8b/rto.yaml:8",
    "llama3_8b/rto_roles.yaml:8",
    "llama3_8b/rto_own_ranks.yaml:8:2",
    "llama3_8b/rto_colocated.yaml:8",
    "llama3_1_8b/rto_32k.yaml:16",
    "qwen3_30b_a3b/dpo.yaml:32",
    "qwen3_30b_a3b/rto.yaml:32",
)


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
        """As they are written on the command line."""
        recipe, *numbers = text.split(":")
        gpus, pool_gpus = (*map(int, numbers), *(None,) * 2)[:2]
        return cls(recipe, gpus or 8, pool_gpus)


def line(wanted: Wanted) -> str:
    """The recipe's line of the table."""
    from rto_megatron.simulation.whole_job import simulate_job

    config = load_recipe(RECIPES / wanted.recipe)
    world_size, _ = split_gpus(config, wanted.gpus, wanted.pool_gpus)
    assume = [] if "llama3_1" not in wanted.recipe else ["dpo=llama-3.1-8b"]
    plan, shapes = judged(config, world_size, assume, "")
    ranks = simulate_job(plan, {name: found.shape for name, found in shapes.items()})
    fullest = max(ranks, key=lambda one: one.peak)
    peaks = {phase.name: gib(phase.peak) for phase in fullest.phases}
    cells = [peaks.get(phase, "") for phase in PHASES]
    formula, seconds = gib(fullest_bytes(plan, shapes)), sum(rank.seconds for rank in ranks)
    kinds = f"{len(ranks)} of {world_size}"
    return " | ".join(
        [f"| `{wanted.recipe}`", str(wanted.gpus), kinds, *cells, formula, f"{seconds:.0f} s |"]
    )


def main() -> None:
    """Prints the table."""
    prepare()
    names = ["recipe", "GPUs", "kinds of ranks", *PHASES, "`rto check`", "simulated in"]
    print(" | ".join(["| " + names[0], *names[1:]]) + " |")
    print("|" + "---|" * len(names))
    for text in sys.argv[1:] or DISTINCT:
        print(line(Wanted.of(text)), flush=True)


if __name__ == "__main__":
    main()
