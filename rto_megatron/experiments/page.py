"""The experiment's table and plots: Markdown, JSON, PNG and one HTML page that needs nothing else."""

import html
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from rto_megatron.experiments.design import Experiment, Rows
from rto_megatron.experiments.plots import draw
from rto_megatron.experiments.summary import (
    ArmResult,
    SeedResult,
    summarise,
    tuning,
)

_HEADER = (
    "arm",
    "learning rate",
    "true return",
    "better than PPO",
    "episodes to the threshold",
    "PPO's episodes / the arm's",
    "true return at matched KL",
    "final KL",
    "response tokens",
    "reward model",
    "distinct bigrams",
)


def write_report(experiment: Experiment, root: Path) -> str:
    """Writes table.md, table.json, four PNG files and report.html into `root`; returns the main table.

    Raises:
        UserError: a run is not finished.
    """
    results = summarise(experiment, root)
    tables: tuple[Rows, ...] = (
        arm_rows(results, experiment),
        paired_rows(results, experiment),
        _seed_rows(results, experiment),
        _tuning_rows(experiment, root),
    )
    if experiment.beside is not None:
        tables = (*tables, experiment.beside(experiment, root))
    table = _markdown(tables[0])
    (root / "table.md").write_text("\n\n".join(_markdown(rows) for rows in tables) + "\n")
    (root / "table.json").write_text(
        json.dumps([_entry(arm, experiment) for arm in results], indent=1) + "\n"
    )
    drawings = draw(results, experiment, root)
    pages = [*(_html_table(rows) for rows in tables), *drawings]
    (root / "report.html").write_text(
        _PAGE.format(title=html.escape(experiment.title), body="\n".join(pages)), encoding="utf-8"
    )
    return f"{table}\n\n{root}: table.md, table.json, report.html and PNG files"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px sans-serif; margin: 2em auto; max-width: 70em }}
table {{ border-collapse: collapse; margin-bottom: 2em }}
td, th {{ border: 1px solid #bbb; padding: .3em .6em; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
svg {{ max-width: 100%; height: auto }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def arm_rows(results: Sequence[ArmResult], experiment: Experiment) -> Rows:
    """Each arm's means over seeds with their standard errors, medians of episodes: what `rto language` prints."""
    ppo = next(arm for arm in results if arm.name == "ppo")
    rows: list[Sequence[str]] = [_HEADER]
    for arm in results:
        better = sum(
            experiment.earned(one.evaluation) > experiment.earned(other.evaluation)
            for one, other in zip(arm.seeds, ppo.seeds, strict=True)
        )
        ratios = [
            other.episodes / one.episodes
            for one, other in zip(arm.seeds, ppo.seeds, strict=True)
            if one.episodes is not None and other.episodes is not None
        ]
        reached = [one.episodes for one in arm.seeds if one.episodes is not None]
        num = len(arm.seeds)
        rows.append(
            (
                arm.name,
                "-" if arm.factor is None else f"x {arm.factor:.2g}",
                _mean(arm, lambda one: experiment.earned(one.evaluation)),
                "-" if arm is ppo else f"{better} of {num}",
                "-" if arm.factor is None else _median(reached, num, "{:.0f}"),
                "-" if arm.factor is None else _median(ratios, num, "{:.2f}"),
                "-" if arm.factor is None else _mean(arm, lambda one: one.at_matched_kl),
                _mean(arm, lambda one: one.evaluation.kl.mean),
                _mean(arm, lambda one: one.evaluation.response_tokens.mean),
                _mean(arm, lambda one: None if one.evaluation.score is None else one.evaluation.score.mean),
                _mean(arm, lambda one: one.distinct, "-"),
            )
        )
    return rows


def paired_rows(results: Sequence[ArmResult], experiment: Experiment) -> Rows:
    """What is claimed of an arm rests on these: the spread of seeds, which all arms share, is not in them."""
    ppo = next(arm for arm in results if arm.name == "ppo")
    head = ("less PPO's of the same seed", "true return", "true return at matched KL")
    rows: list[Sequence[str]] = [(*head[:2], "in standard errors", *head[2:], "in standard errors")]
    for arm in results:
        if arm.factor is None or arm is ppo:
            continue
        pairs = list(zip(arm.seeds, ppo.seeds, strict=True))
        ends = [experiment.earned(a.evaluation) - experiment.earned(b.evaluation) for a, b in pairs]
        matched = [
            a.at_matched_kl - b.at_matched_kl
            for a, b in pairs
            if a.at_matched_kl is not None and b.at_matched_kl is not None
        ]
        rows.append((arm.name, *paired(ends, len(pairs)), *paired(matched, len(pairs))))
    return rows


def paired(differences: Sequence[float], num_seeds: int) -> tuple[str, str]:
    """Mean and standard error of differences over seeds, and how many of its standard errors the mean is."""
    if len(differences) < 2:
        return ("-" if not differences else f"{differences[0]:+.4g} (1 of {num_seeds})"), "-"
    mean, error = statistics.fmean(differences), _standard_error(differences)
    shown = f"{mean:+.4g} ± {error:.2g}{_count(differences, num_seeds)}"
    return shown, f"{mean / error:+.1f}" if error > 0 else "-"


def _tuning_rows(experiment: Experiment, root: Path) -> Rows:
    seeds = [f"seed {seed}" for seed in experiment.design.tuning_seeds]
    rows: list[Sequence[str]] = [
        ("last quarter's true return, episodes to the threshold", "learning rate", *seeds)
    ]
    for one in tuning(experiment, root):
        cells = (
            f"{earned:.2f}, {'never' if episodes is None else f'{episodes:.0f}'}"
            for earned, episodes in zip(one.returns, one.episodes, strict=True)
        )
        rows.append((one.name, f"x {one.factor:.2g}", *cells))
    return rows


def _seed_rows(results: Sequence[ArmResult], experiment: Experiment) -> Rows:
    rows: list[Sequence[str]] = [
        ("true return, episodes to the threshold", *map(str, experiment.design.seeds))
    ]
    for arm in results:
        cells = []
        for one in arm.seeds:
            episodes = "never" if one.episodes is None else f"{one.episodes:.0f}"
            shown = "" if one.curve is None else f", {episodes}"
            cells.append(f"{experiment.earned(one.evaluation):.2f}{shown}")
        rows.append((arm.name, *cells))
    return rows


def _mean(arm: ArmResult, value: Callable[[SeedResult], float | None], none: str = "never") -> str:
    """Mean and standard error over the seeds that have a value, and how many do if not all."""
    values = [number for one in arm.seeds if (number := value(one)) is not None]
    if not values:
        return none
    error = f" ± {_standard_error(values):.3f}" if len(values) > 1 else ""  # of one seed it is not known
    return f"{statistics.fmean(values):.3f}{error}{_count(values, len(arm.seeds))}"


def _median(values: Sequence[float], num_seeds: int, form: str) -> str:
    if not values:
        return "never"
    return form.format(statistics.median(values)) + _count(values, num_seeds)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _count(values: Sequence[float], num_seeds: int) -> str:
    """How many seeds have a value, if not all."""
    return "" if len(values) == num_seeds else f" ({len(values)} of {num_seeds})"


def _entry(arm: ArmResult, experiment: Experiment) -> dict[str, object]:
    return {
        "arm": arm.name,
        "learning_rate_factor": arm.factor,
        "true_return": [experiment.earned(one.evaluation) for one in arm.seeds],
        "episodes_to_threshold": [one.episodes for one in arm.seeds],
        "true_return_at_matched_kl": [one.at_matched_kl for one in arm.seeds],
        "kl": [one.evaluation.kl.mean for one in arm.seeds],
        "response_tokens": [one.evaluation.response_tokens.mean for one in arm.seeds],
        "curves": [
            None
            if one.curve is None
            else {"true_return": one.curve.returns.tolist(), "kl": one.curve.kl.tolist()}
            for one in arm.seeds
        ],
    }


def _markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _html_table(rows: Rows) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(rows[0], "th") + "".join(line(row, "td") for row in rows[1:]) + "</table>"
