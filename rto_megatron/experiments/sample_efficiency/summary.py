"""The numbers of the experiment's table, per arm and per seed."""

from dataclasses import dataclass
from pathlib import Path

from rto_megatron.errors import RunFolderError
from rto_megatron.experiments.sample_efficiency import Design
from rto_megatron.experiments.sample_efficiency.arms import ARMS
from rto_megatron.experiments.sample_efficiency.curves import (
    Curve,
    best_factor,
    episodes_to,
    last_quarter,
    read_curve,
    return_at_kl,
    run_name,
    seed_folder,
)
from rto_megatron.reporting.evaluation import Evaluation, read_evaluation


@dataclass(frozen=True)
class SeedResult:
    """One arm on one seed; an offline point has no curve.

    Example:
        SeedResult(evaluation, curve=None, episodes=None, at_matched_kl=None)
    """

    evaluation: Evaluation  # of the final policy, on held-out prompts
    curve: Curve | None
    episodes: float | None  # to the threshold; None: never reached, or no curve
    at_matched_kl: float | None  # true return; None: the run never went so far, or no curve


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


def thresholds(root: Path, design: Design) -> dict[int, float]:
    """Seed -> the true return that counts as PPO's level."""
    best = best_factor(root, "ppo", design)
    levels = {}
    for seed in design.seeds:
        before = true_return(_evaluation(root, seed, "sft"))
        after = float(read_curve(root, seed, "ppo", best).returns[-design.window :].mean())
        levels[seed] = before + design.threshold * (after - before)
    return levels


def tuning(root: Path, design: Design) -> list[TuningResult]:
    """Every learning rate that was tried."""
    levels = thresholds(root, design)
    results = []
    for name in ("ppo", "rto"):
        for factor in design.factors:
            curves = {seed: read_curve(root, seed, name, factor) for seed in design.tuning_seeds}
            returns = tuple(last_quarter(curve) for curve in curves.values())
            episodes = tuple(episodes_to(c, levels[seed], design.window) for seed, c in curves.items())
            results.append(TuningResult(name, factor, returns, episodes))
    return results


def summarise(root: Path, design: Design) -> list[ArmResult]:
    """SFT and DPO, then every arm, each at the learning rate of its family.

    Raises:
        UserError: a run or an evaluation is not finished.
    """
    results = []
    for system in ("sft", "dpo"):
        evaluations = [_evaluation(root, seed, system) for seed in design.seeds]
        results.append(ArmResult(system, None, tuple(SeedResult(e, None, None, None) for e in evaluations)))
    best = {name: best_factor(root, name, design) for name in ("ppo", "rto")}
    levels = thresholds(root, design)
    for arm in ARMS:
        factor = best[arm.tuned_as]
        curves = [read_curve(root, seed, arm.name, factor) for seed in design.seeds]
        seeds = (
            SeedResult(
                _evaluation(root, seed, run_name(arm.name, factor)),
                curve,
                episodes_to(curve, levels[seed], design.window),
                return_at_kl(curve, design.matched_kl, design.window),
            )
            for seed, curve in zip(design.seeds, curves, strict=True)
        )
        results.append(ArmResult(arm.name, factor, tuple(seeds)))
    return results


def true_return(evaluation: Evaluation) -> float:
    """The mean true return, which every evaluation of the synthetic task has.

    Raises:
        RunFolderError: it was taken without the task's table.
    """
    if evaluation.true_return is None:
        raise RunFolderError(
            f"the evaluation {evaluation.name!r} has no true return; set evaluate.true_reward and evaluate it again"
        )
    return evaluation.true_return.mean


def _evaluation(root: Path, seed: int, system: str) -> Evaluation:
    return read_evaluation(seed_folder(root, seed) / "evaluations" / system)
