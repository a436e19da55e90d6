#!/usr/bin/env python
"""Prints docs/metrics.md: every metric of a training run with its unit, meaning and stages.

Usage: .venv/bin/python tools/list_metrics.py > docs/metrics.md
"""

from rto_megatron.reporting.metric_names import GROUPS, THEMES, Metric

INTRODUCTION = """\
# Metrics

This page is printed by `tools/list_metrics.py` from `rto_megatron/reporting/metric_names.py`; edit that file.

A training run writes one JSON object per step to `<run>/metrics.jsonl`, and the same numbers to `run.loggers`
(unless said otherwise `<run>/tensorboard`).
Each object has `step`, counted from 1, and `time`, seconds since the epoch. A number that is not finite is `null`. A
mean is taken once over all ranks: sums and counts are added first and divided last. A step whose numbers were refused
lacks the metrics of what was not done. The stage `evaluate` has no steps: it writes `<run>/evaluation.json`, which
`rto report` shows.
"""


def row(metric: Metric) -> str:
    """One line of a table."""
    stages = metric.stages.title + (f"; {metric.needs}" if metric.needs else "")
    return f"| `{metric.name}` | {metric.unit} | {metric.meaning.replace('|', chr(92) + '|')} | {stages} |"


def main() -> None:
    """Prints the page."""
    print(INTRODUCTION)
    print("| in the column of stages | is |\n|---|---|")
    for group in GROUPS:
        print(f"| {group.title} | {', '.join(f'`{stage}`' for stage in group.stages)} |")
    print("\nWhat stands there behind a semicolon has to be there too.")
    for theme in THEMES:
        print(f"\n## {theme.title}\n\n{theme.note}\n\n| name | unit | meaning | stages |\n|---|---|---|---|")
        print("\n".join(map(row, theme.metrics)))


if __name__ == "__main__":
    main()
