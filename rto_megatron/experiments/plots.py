"""The experiment's plots, thin lines for seeds and thick ones for their mean; PNG files, and SVG for the page."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")  # no display

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rto_megatron.experiments.curves import Curve, Series
from rto_megatron.experiments.design import Experiment
from rto_megatron.experiments.summary import ArmResult

type Axis = Callable[[Curve], Series]


def draw(results: Sequence[ArmResult], experiment: Experiment, folder: Path) -> list[str]:
    """Writes the PNG files into `folder` and returns the same drawings as SVG."""
    trained = [arm for arm in results if arm.factor is not None]
    figures = {
        "return_by_episodes": _lines(
            trained, experiment, lambda c: c.episodes, lambda c: c.returns, ("episodes", "true return")
        ),
        "return_by_kl": _lines(
            trained, experiment, lambda c: c.kl, lambda c: c.returns, ("KL to reference, nats", "true return")
        ),
        "response_tokens": _lines(
            trained, experiment, lambda c: c.episodes, lambda c: c.tokens, ("episodes", "response tokens")
        ),
        "episodes_to_threshold": _bars(trained, experiment),
    }
    _offline_points(results, experiment, figures["return_by_episodes"].axes[0])
    drawings = []
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=130)
        page = io.StringIO()
        figure.savefig(page, format="svg")
        pyplot.close(figure)
        drawings.append(page.getvalue()[page.getvalue().index("<svg") :])
    return drawings


def _lines(
    arms: Sequence[ArmResult], experiment: Experiment, x: Axis, y: Axis, labels: tuple[str, str]
) -> Figure:
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for arm in arms:
        curves = [one.curve.smoothed(experiment.design.window) for one in arm.seeds if one.curve is not None]
        (mean,) = axes.plot(
            np.mean([x(c) for c in curves], 0), np.mean([y(c) for c in curves], 0), lw=2, label=arm.name
        )
        for curve in curves:
            axes.plot(x(curve), y(curve), lw=0.5, alpha=0.4, color=mean.get_color())
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.legend(fontsize="small")
    return figure


def _offline_points(results: Sequence[ArmResult], experiment: Experiment, axes: Axes) -> None:
    for arm in results:
        if arm.factor is None:
            level = float(np.mean([experiment.earned(one.evaluation) for one in arm.seeds]))
            axes.axhline(level, ls=":", color="black", lw=1)
            axes.annotate(arm.name, (axes.get_xlim()[0], level), fontsize="small", va="bottom")


def _bars(arms: Sequence[ArmResult], experiment: Experiment) -> Figure:
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(experiment.design.seeds)
    for place, arm in enumerate(arms):
        for index, one in enumerate(arm.seeds):
            if one.episodes is not None:
                axes.bar(place - 0.4 + (index + 0.5) * width, one.episodes, width, color=f"C{place}")
    axes.set_xticks(range(len(arms)), [arm.name for arm in arms], fontsize="small")
    axes.set_ylabel(f"episodes to {experiment.design.threshold:g} of PPO's gain (no bar: never)")
    return figure
