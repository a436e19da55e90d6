"""What the runs of the experiment left: learning curves, and the numbers that are read off them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rto_megatron.config import schema
from rto_megatron.config.load import load_stage
from rto_megatron.errors import RunFolderError
from rto_megatron.experiments.design import Experiment
from rto_megatron.reporting.metrics import read_metrics

Series = NDArray[np.floating]


@dataclass(frozen=True)
class Curve:
    """One run. Entry i is of the responses of step i, sampled by the policy before that step's update.

    Example:
        curve.smoothed(window=5).returns[-1]
    """

    episodes: Series  # sampled up to and including step i
    returns: Series  # true return, mean over the responses of the step
    kl: Series  # to the reference, nats per response
    tokens: Series  # per response

    def smoothed(self, window: int) -> "Curve":
        """Means over `window` steps, or over all of a run that has fewer, each at the last of them."""
        window = min(window, len(self.episodes))
        kernel = np.ones(window) / window
        returns, kl, tokens = (
            np.convolve(one, kernel, "valid") for one in (self.returns, self.kl, self.tokens)
        )
        return Curve(self.episodes[window - 1 :], returns, kl, tokens)


def seed_folder(root: Path, seed: int) -> Path:
    """Everything of one seed."""
    return root / f"seed{seed}"


def run_name(arm: str, factor: float) -> str:
    """The folder of an arm's run at a learning rate."""
    return f"{arm}_x{factor:.2g}"


def read_curve(experiment: Experiment, root: Path, seed: int, arm: str, factor: float) -> Curve:
    """The metrics of a finished run.

    Raises:
        RunFolderError: the run is not there or not finished.
    """
    folder = seed_folder(root, seed) / run_name(arm, factor)
    rows = read_metrics(folder)
    if not (folder / "hf").is_dir() or not rows:
        raise RunFolderError(
            f"{folder} is not finished; run the experiment again, it goes on where it stopped"
        )
    config = load_stage(folder / "config.yaml", schema.ReinforcementStage)
    names = (experiment.metric, "objective/kl", "rollout/response_tokens")
    returns, kl, tokens = (np.array([row[name] for row in rows]) for name in names)
    return Curve(config.responses_per_step * np.arange(1.0, len(rows) + 1), returns, kl, tokens)


def last_quarter(curve: Curve) -> float:
    """Mean true return of the last quarter of steps, of the last one where there are fewer than eight."""
    return float(curve.returns[-max(1, len(curve.returns) // 4) :].mean())


def best_factor(experiment: Experiment, root: Path, arm: str) -> float:
    """The learning-rate factor whose last quarter of steps earns most, mean over the tuning seeds; the only one."""
    design = experiment.design
    if len(design.factors) == 1:
        return design.factors[0]  # chosen before, and so known before any run is made

    def earned(factor: float) -> float:
        curves = (read_curve(experiment, root, seed, arm, factor) for seed in design.tuning_seeds)
        return float(np.mean([last_quarter(curve) for curve in curves]))

    return max(design.factors, key=earned)


def episodes_to(curve: Curve, level: float, window: int) -> float | None:
    """Episodes until the mean over `window` steps first is at least `level`; None if it never is."""
    smooth = curve.smoothed(window)
    reached = np.flatnonzero(smooth.returns >= level)
    return float(smooth.episodes[reached[0]]) if len(reached) else None


def return_at_kl(curve: Curve, kl: float, window: int) -> float | None:
    """True return where the smoothed curve first has this KL, by linear interpolation; None if it never does."""
    smooth = curve.smoothed(window)
    beyond = np.flatnonzero(smooth.kl >= kl)
    if not len(beyond):
        return None
    after = int(beyond[0])
    if after == 0:
        return float(smooth.returns[0])
    share = (kl - smooth.kl[after - 1]) / (smooth.kl[after] - smooth.kl[after - 1])
    return float(smooth.returns[after - 1] + share * (smooth.returns[after] - smooth.returns[after - 1]))
