"""Where a run's numbers go beside metrics.jsonl: TensorBoard, Weights & Biases, SwanLab, behind one small protocol."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from rto_megatron.config.training import LoggerName

type Setting = str | int | float | bool
_PACKAGES: dict[LoggerName, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "swanlab": "swanlab"}


@dataclass(frozen=True)
class SampleText:
    """One sampled response, for people.

    Example:
        SampleText("2 + 2 =", " 4", {"score": 0.7, "reward": 0.6})
    """

    prompt: str
    response: str
    numbers: Mapping[str, float]


class RunLogger(Protocol):
    """One place that shows a run; it lives on the lead rank. It is made with the run's folder and settings.

    Example:
        logger.scalars(12, {"reward/score": 0.7})
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of a step, counted from 1; some may not be finite."""
        ...

    def samples(self, step: int, texts: Sequence[SampleText]) -> None:
        """Takes a few responses of a step."""
        ...

    def close(self) -> None:
        """Sends or writes what is left."""
        ...


@dataclass(frozen=True)
class LoggedRun:
    """What a logger knows of its run from the start.

    Example:
        LoggedRun(Path("runs/rto"), resumed_step=20, settings={"stage": "rto"})
    """

    dir: Path
    resumed_step: int  # 0: a new run
    settings: Mapping[str, Setting]  # dotted key -> value

    def id_of(self, service: str, fresh: str) -> str:
        """The run's name at a service, `fresh` for a new one; a resumed run goes on under the name that it has."""
        path = self.dir / f"{service}_id"
        if self.resumed_step and path.is_file():
            return path.read_text("utf-8").strip()
        path.write_text(f"{fresh}\n", "utf-8")
        return fresh


def open_loggers(names: Sequence[LoggerName], run: LoggedRun) -> list[RunLogger]:
    """The loggers with these names; each loads its package only here."""
    opened: list[RunLogger] = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            from rto_megatron.reporting.tensorboard_logger import TensorboardLogger

            opened.append(TensorboardLogger(run))
        elif name == "wandb":
            from rto_megatron.reporting.wandb_logger import WandbLogger

            opened.append(WandbLogger(run))
        else:
            from rto_megatron.reporting.swanlab_logger import SwanlabLogger

            opened.append(SwanlabLogger(run))
    return opened


def missing_loggers(names: Sequence[LoggerName]) -> list[str]:
    """A sentence for each logger whose package is not installed."""
    return [
        f"run.loggers names {name}, whose package is not installed; install it (requirements/loggers.txt says how), or "
        f"remove {name}"
        for name in names
        if find_spec(_PACKAGES[name]) is None
    ]


def settings_of(tree: Mapping[str, object], prefix: str = "") -> dict[str, Setting]:
    """Dotted key -> value of a configuration; what is neither number nor text is written as text."""
    return dict(_flat(tree, prefix))


def _flat(tree: Mapping[str, object], prefix: str) -> Iterator[tuple[str, Setting]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str | int | float) else str(value)
