"""The numbers of the experiment's table, per arm and per seed."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rto_megatron.experiments.curves import (
    Curve,
    best_factor,
    episodes_to,
    last_quarter,
    read_curve,
    return_at_kl,
    run_name,
    seed_folder,
)
from rto_megatron.experiments.design import Experiment
from rto_megatron.reporting.evaluation import Evaluation, read_evaluation


@dataclass(frozen=True)
class SeedResult:
    """One arm on one seed; an offline point has no curve.

    Example:
        SeedResult(evaluation, curve=None, episodes=None, at_matched_kl=None, distinct=0.6)
    """

    evaluation: Evaluation  # of the final policy, on held-out prompts
    curve: Curve | None
    episodes: float | None  # to the threshold; None: never reached, or no curve
    at_matched_kl: float | None  # true return; None: the run never went so far, or no curve
    # Of the pairs of words that follow each other in its evaluated responses; None: they were not kept.
    distinct: float | None


@dataclass(frozen=True)
class ArmResult:
    """One arm on all seeds, in the design's order.

    Example:
        ArmResult(name="rto", factor=1.0, seeds=(seed_result,))
    """

    name: str
    factor: float | None  # of the recipe's learning rate; None for offline points
    seeds: tuple[SeedResult, ...]


@dataclass(frozen=True)
class TuningResult:
    """PPO or RTO at one learning rate on the tuning seeds: what the choice was made on.

    Example:
        TuningResult(name="ppo", factor=2.0, returns=(0.4, 0.5), episodes=(900.0, None))
    """

    name: str
    factor: float
    returns: tuple[float, ...]  # mean of the last quarter of steps
    episodes: tuple[float | None, ...]  # to the threshold


def thresholds(experiment: Experiment, root: Path) -> dict[int, float]:
    """Seed -> the true return that counts as PPO's level; infinite where PPO gained nothing, which no arm reaches."""
    best, design = best_factor(experiment, root, "ppo"), experiment.design
    levels = {}
    for seed in design.seeds:
        before = experiment.earned(_evaluation(root, seed, experiment.start))
        after = float(read_curve(experiment, root, seed, "ppo", best).returns[-design.window :].mean())
        levels[seed] = before + design.threshold * (after - before) if after > before else math.inf
    return levels


def tuning(experiment: Experiment, root: Path) -> list[TuningResult]:
    """Every learning rate that was tried."""
    levels, design = thresholds(experiment, root), experiment.design
    results = []
    for name in ("ppo", "rto"):
        for factor in design.factors:
            curves = {seed: read_curve(experiment, root, seed, name, factor) for seed in design.tuning_seeds}
            returns = tuple(last_quarter(curve) for curve in curves.values())
            episodes = tuple(episodes_to(c, levels[seed], design.window) for seed, c in curves.items())
            results.append(TuningResult(name, factor, returns, episodes))
    return results


def summarise(experiment: Experiment, root: Path) -> list[ArmResult]:
    """The start and DPO, then every arm, each at the learning rate of its family.

    Raises:
        UserError: a run or an evaluation is not finished.
    """
    results, design = [], experiment.design
    for system in (experiment.start, "dpo"):
        offline = (
            SeedResult(_evaluation(root, seed, system), None, None, None, _distinct(root, seed, system))
            for seed in design.seeds
        )
        results.append(ArmResult(system, None, tuple(offline)))
    best = {name: best_factor(experiment, root, name) for name in ("ppo", "rto")}
    levels = thresholds(experiment, root)
    for arm in experiment.arms:
        factor = best[arm.tuned_as]
        curves = [read_curve(experiment, root, seed, arm.name, factor) for seed in design.seeds]
        seeds = (
            SeedResult(
                _evaluation(root, seed, run_name(arm.name, factor)),
                curve,
                episodes_to(curve, levels[seed], design.window),
                return_at_kl(curve, design.matched_kl, design.window),
                _distinct(root, seed, run_name(arm.name, factor)),
            )
            for seed, curve in zip(design.seeds, curves, strict=True)
        )
        results.append(ArmResult(arm.name, factor, tuple(seeds)))
    return results


def distinct_bigrams(texts: Iterable[str]) -> float | None:
    """Different pairs of following words over all of them, which falls where responses repeat each other."""
    pairs = [pair for text in texts for pair in pairwise(text.lower().split())]
    return len(set(pairs)) / len(pairs) if pairs else None


def _distinct(root: Path, seed: int, system: str) -> float | None:
    kept = seed_folder(root, seed) / "evaluations" / system / "evaluation.jsonl"
    if not kept.is_file():
        return None
    # Read by line: a response may hold what str.splitlines takes for an end of line.
    with kept.open(encoding="utf-8") as rows:
        return distinct_bigrams(json.loads(row)["response"] for row in rows)


def _evaluation(root: Path, seed: int, system: str) -> Evaluation:
    return read_evaluation(seed_folder(root, seed) / "evaluations" / system)
