"""Metrics of a run: summed over ranks, divided once, written to metrics.jsonl and what else shows the run."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from rto_megatron.config.run_folder import make_run_folder
from rto_megatron.config.training import LoggerName
from rto_megatron.platform.whole_files import write_whole
from rto_megatron.reporting.loggers import LoggedRun, SampleText, Setting, open_loggers
from rto_megatron.types import Metrics

AllSum = Callable[[Tensor], Tensor]  # sums a tensor over all ranks
AllNames = Callable[[tuple[str, ...]], tuple[str, ...]]  # sorted union of all ranks' names


def reduce_metrics(metrics: Metrics, all_sum: AllSum, all_names: AllNames) -> dict[str, float]:
    """Means over all ranks: the sums and the counts are added, then divided once.

    Every rank must call it. A rank may lack names that others have (a pipeline stage without a loss), and
    ranks that hold the same numbers (tensor parallel) count them equally often in both.

    Args:
        metrics: name -> (sum, count) of this rank.
        all_sum: sums a float64 tensor [names, 2] over all ranks.
        all_names: gives the sorted union of the names of all ranks.

    Returns:
        name -> mean; names whose count is 0 on every rank are left out.
    """
    names = all_names(tuple(sorted(metrics)))
    pairs = [metrics.get(name, (0.0, 0.0)) for name in names]
    summed = all_sum(torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)).tolist()
    return {name: value / count for name, (value, count) in zip(names, summed, strict=True) if count != 0}


def with_margin(means: Mapping[str, float]) -> dict[str, float]:
    """Adds `rewards/margins` where a loss on single answers gave only the rewards of both kinds.

    It is a difference of means over different answers, so it can only be taken from what is reduced.
    """
    chosen, rejected = means.get("rewards/chosen"), means.get("rewards/rejected")
    if chosen is None or rejected is None:
        return dict(means)
    return {"rewards/margins": chosen - rejected, **means}


class MetricLog:
    """metrics.jsonl (one object a step, with `step` and `time` in seconds since the epoch) and the run's loggers.

    Open it on the lead rank only: loggers load packages, seconds that ranks without a log need not spend. Entries after
    `resumed_step` are dropped, so that a run that was stopped between two checkpoints and goes on from the earlier one
    has every step once.

    Example:
        MetricLog(run_dir).write(step=1, values={"train/loss": 0.5})
    """

    def __init__(
        self,
        run_dir: Path,
        resumed_step: int = 0,
        loggers: Sequence[LoggerName] = ("tensorboard",),
        settings: Mapping[str, Setting] | None = None,
    ) -> None:
        make_run_folder(run_dir)
        path = run_dir / "metrics.jsonl"
        _keep_steps_up_to(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self._loggers = open_loggers(loggers, LoggedRun(run_dir, resumed_step, settings or {}))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of `step`; a value that is not finite becomes null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
        self._file.flush()
        for logger in self._loggers:
            logger.scalars(step, values)

    def samples(self, step: int, texts: Sequence[SampleText]) -> None:
        """Show a few responses of `step` in every logger."""
        for logger in self._loggers:
            logger.samples(step, texts)

    def close(self) -> None:
        """Flush and close all."""
        self._file.close()
        for logger in self._loggers:
            logger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The entries of metrics.jsonl, oldest first; a last line that was cut off is left out."""
    path = run_dir / "metrics.jsonl"
    return list(_entries(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []


def _entries(lines: Iterable[str]) -> Iterable[dict[str, float]]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the process was killed while it wrote this line
            return


def _keep_steps_up_to(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = [
        entry for entry in _entries(path.read_text(encoding="utf-8").splitlines()) if entry["step"] <= step
    ]
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept))
