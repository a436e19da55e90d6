#!/usr/bin/env python
"""The table of launchers/experiments/ahead.sh: what policies earn that learn from rollouts ahead of them.

Usage: .venv/bin/python tools/ahead_returns.py DIR

A true return is that of a step's own responses, as they were sampled; a quarter is the mean over that part of the
steps. Columns after them are means over the run. ± is the standard error over seeds.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rto_megatron.errors import UserError
from rto_megatron.reporting.metrics import read_metrics

Rows = Sequence[dict[str, float]]


def quarter(number: int) -> Callable[[Rows], float]:
    """The mean true return of a quarter of a run, counted from 0."""

    def earned(rows: Rows) -> float:
        first, last = number * len(rows) // 4, (number + 1) * len(rows) // 4
        return statistics.fmean(row["task/true_return"] for row in rows[first:last])

    return earned


def mean_of(name: str) -> Callable[[Rows], float]:
    """The mean of a metric over the run."""
    return lambda rows: statistics.fmean(row[name] for row in rows if name in row)


COLUMNS: dict[str, Callable[[Rows], float]] = {
    **{f"true return, quarter {number + 1}": quarter(number) for number in range(4)},
    "last step's KL, nats": lambda rows: rows[-1]["objective/kl"],
    "age, steps": mean_of("rollout/age_steps"),
    "importance": mean_of("pool/importance_mean"),
    "above the cap": mean_of("pool/importance_capped_fraction"),
    "s a step": mean_of("time/step_s"),
    "s waited": mean_of("time/pool_wait_s"),
}


def told(values: Sequence[float]) -> str:
    """Mean and standard error."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def main() -> None:
    """Prints the table, and the last quarter of every seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="folder of the experiment")
    root = parser.parse_args().root
    table = Table("ahead", "seeds", "episodes", *COLUMNS)
    per_seed = Table("true return of the last quarter, seed", *(f"ahead {ahead}" for ahead in range(3)))
    found: dict[str, list[str]] = {}
    for ahead in range(3):
        runs = sorted(path for path in root.glob(f"ahead{ahead}-seed*") if (path / "hf").is_dir())
        if not runs:
            raise UserError(
                f"{root} holds no finished run of rollout.ahead={ahead}; run the experiment first"
            )
        rows = [read_metrics(run) for run in runs]
        episodes = {round(sum(r["time/samples_per_s"] * r["time/step_s"] for r in one)) for one in rows}
        cells = (told([column(one) for one in rows]) for column in COLUMNS.values())
        table.add_row(str(ahead), str(len(runs)), ", ".join(map(str, sorted(episodes))), *cells)
        for run, one in zip(runs, rows, strict=True):
            found.setdefault(run.name.partition("-")[2], []).append(f"{quarter(3)(one):.3f}")
    for seed, returns in found.items():
        per_seed.add_row(seed, *returns)
    console = Console(width=200)
    console.print(table)
    console.print(per_seed)


if __name__ == "__main__":
    main()
