"""AlpacaEval's win rates of one model, from its annotations.json.

Source: alpaca_eval's metrics/winrate.py. A preference is 1 where the baseline (output_1) is better, 2 where the model
is, and anything between for a judge that weighs both; numbers agree with tests/golden/eval.json.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rto_megatron.errors import DataError, refuse_if

_TIE = 1.5
_OLD_TIE = 0.0  # how early files write one


@dataclass(frozen=True)
class Annotation:
    """One row of annotations.json.

    Example:
        Annotation("2 + 2?", baseline_output="4", output="Four.", preference=1.5, baseline="gpt4", model="rto")
    """

    instruction: str
    baseline_output: str
    output: str
    preference: float | None  # 1 to 2; None: the judge gave none
    baseline: str
    model: str


@dataclass(frozen=True)
class WinRate:
    """AlpacaEval's numbers of one model; rates in percent.

    Example:
        WinRate("rto", "gpt4", 22.45, 1.2, 21.9, num_wins=176, num_losses=620, num_ties=9, num_unjudged=0, characters=9)
    """

    model: str
    baseline: str
    win_rate: float
    standard_error: float  # of the mean over instructions
    discrete_win_rate: float  # each preference rounded to a win, a loss or a tie first
    num_wins: int
    num_losses: int
    num_ties: int
    num_unjudged: int  # left out of all rates
    characters: float  # of an output, on average

    @property
    def num_judged(self) -> int:
        """Instructions in the rates."""
        return self.num_wins + self.num_losses + self.num_ties


def read_annotations(path: Path) -> tuple[Annotation, ...]:
    """Reads annotations.json as alpaca_eval or `rto judge` write it.

    Raises:
        DataError: no such file; names every row that is none, is there twice, or is of another model than the first.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(rows, list) or not rows:
        found_there = type(rows).__name__ if rows or not isinstance(rows, list) else "an empty one"
        raise DataError(
            f"{path}: expected a list of annotations, found {found_there}; name an annotations.json that rto judge or "
            "alpaca_eval wrote"
        )
    found, problems = [], []
    for number, row in enumerate(rows, 1):
        try:
            found.append(_annotation(row))
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{path} row {number}: {type(error).__name__}: {error}")
    often = [text for text, count in Counter(one.instruction for one in found).items() if count > 1]
    problems += [f"{path}: {text!r:.80} is annotated more than once" for text in often]
    pairs = sorted({(one.baseline, one.model) for one in found})
    if len(pairs) > 1:
        problems.append(f"{path}: holds the pairs {pairs}; keep those of one model and one baseline")
    refuse_if(problems, f"{path} cannot be scored", DataError)
    return tuple(found)


def _annotation(row: dict[str, object]) -> Annotation:
    preference = row["preference"]
    if preference is not None:
        preference = float(preference)  # type: ignore[arg-type]  # the caller reports what is none
        if math.isnan(preference):
            preference = None
        elif preference != _OLD_TIE and not 1 <= preference <= 2:
            raise ValueError(f"preference is {preference:g}, expected a number from 1 to 2, or null")
    return Annotation(
        instruction=str(row["instruction"]),
        baseline_output=str(row["output_1"]),
        output=str(row["output_2"]),
        preference=preference,
        baseline=str(row["generator_1"]),
        model=str(row["generator_2"]),
    )


def wins(annotations: Sequence[Annotation]) -> np.ndarray:
    """By how much the model wins each judged row, from 0 to 1, float64."""
    given = [one.preference for one in annotations if one.preference is not None]
    return np.array([_TIE if one == _OLD_TIE else one for one in given], dtype=np.float64) - 1


def win_rate(annotations: Sequence[Annotation]) -> WinRate:
    """The rates of one model.

    Raises:
        DataError: no row has a preference.
    """
    values = wins(annotations)
    if not len(values):
        raise DataError("no row has a preference: the judge never gave a verdict; look at its answers")
    first = annotations[0]
    rounded = np.where(values == 0.5, 0.5, np.round(values))
    return WinRate(
        first.model,
        first.baseline,
        win_rate=100 * float(values.mean()),
        standard_error=100 * standard_error(values),
        discrete_win_rate=100 * float(rounded.mean()),
        num_wins=int((values > 0.5).sum()),
        num_losses=int((values < 0.5).sum()),
        num_ties=int((values == 0.5).sum()),
        num_unjudged=len(annotations) - len(values),
        characters=float(np.mean([len(one.output) for one in annotations])),
    )


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values; NaN where there is one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def bootstrap_interval(
    values: np.ndarray, num_rounds: int, seed: int, percent: float = 95
) -> tuple[float, float]:
    """The interval of the mean over rows that are drawn again; of whole rows, so clustered where a row is a mean.

    Args:
        values: one for each independent part, float64.
        num_rounds: how often all are drawn.
        percent: of the means that lie inside.
    """
    chance = np.random.default_rng(seed)
    means = [values[chance.integers(len(values), size=len(values))].mean() for _ in range(num_rounds)]
    low, high = np.percentile(means, [(100 - percent) / 2, (100 + percent) / 2])
    return float(low), float(high)
