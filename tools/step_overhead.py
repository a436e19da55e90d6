#!/usr/bin/env python
"""What a run's steps spend beside their phases, and on keeping rollouts, as its metrics have it.

Usage: .venv/bin/python tools/step_overhead.py RUN...

Prints, of each run, means over the steps behind the first: the seconds of push, sample, score and update, what of the
step is in none of them, and for how long keeping rollouts held the loop up, both also as a share of the step.
"""

import argparse
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rto_megatron.reporting.metrics import read_metrics

PHASES = ("push", "sample", "score", "update")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, nargs="+", help="run folders of stages that sample, of two steps or more"
    )
    table = Table("run", *PHASES, "step, s", "beside them", "keeping rollouts")
    for run in parser.parse_args().run:
        entries = read_metrics(run)[1:]
        mean = {
            name: statistics.fmean(entry.get(f"time/{name}_s") or 0.0 for entry in entries)
            for name in (*PHASES, "step", "rollouts")
        }
        beside = mean["step"] - sum(mean[phase] for phase in PHASES)
        seconds = [f"{mean[name]:.3f}" for name in (*PHASES, "step")]
        shares = [f"{part:.4f} s, {part / mean['step']:.2%}" for part in (beside, mean["rollouts"])]
        table.add_row(run.name, *seconds, *shares)
    Console().print(table)


if __name__ == "__main__":
    main()
