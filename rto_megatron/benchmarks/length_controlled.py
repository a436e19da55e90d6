"""AlpacaEval's length-controlled win rate: what a logistic model says of the win rate at equal lengths.

Source: alpaca_eval's metrics/glm_winrate.py, `length_controlled_v1`. The model has no intercept and three features of a
row: tanh of the difference of lengths, the instruction's difficulty, and whether the row is of the model. It is fitted
to the model's rows and, lightly, to those of two answerers who gamed lengths (df_gamed.csv of the data set
tatsu-lab/alpaca_eval), which also has the difficulties. Formulas agree with tests/golden/eval.json; the whole was never
run on the official data.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from rto_megatron.benchmarks.win_rates import Annotation, standard_error
from rto_megatron.errors import DataError, refuse_if

NUM_INSTRUCTIONS = 805
GAMED_WEIGHT = 0.1  # of each of both: lambda 0.2, halved
STRENGTHS = tuple(float(one) for one in np.logspace(-4, 4, 10))  # C: the inverse of the penalty's
_NUM_FOLDS = 5
_SEED = 123
_GAMED_COLUMNS = {"index", "preference", "std_delta_len", "instruction_difficulty"}


@dataclass(frozen=True)
class Gamed:
    """What df_gamed.csv holds, column by column; float64, of equal length.

    Example:
        gamed.difficulties[0]
    """

    length: np.ndarray  # tanh of the standardised difference of lengths
    difficulty: np.ndarray
    wins: np.ndarray  # from 0 to 1
    difficulties: Mapping[int, float]  # by the place of the instruction in the official order


@dataclass(frozen=True)
class LengthControlled:
    """The rate, in percent, and the fit behind it.

    Example:
        LengthControlled(27.0, 1.3, strength=21.5, coefficients=(-0.4, 0.5, -0.8))
    """

    win_rate: float
    standard_error: float  # over instructions, of the fitted probabilities, as AlpacaEval gives it
    strength: float  # C
    coefficients: tuple[float, float, float]  # of length, difficulty, and being the model's row


def read_gamed(path: Path) -> Gamed:
    """Reads df_gamed.csv.

    Raises:
        DataError: it is no such file.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        missing = _GAMED_COLUMNS - (rows[0].keys() if rows else set())
        if missing:
            raise KeyError(", ".join(sorted(missing)))
        places = [int(row["index"]) for row in rows]
        difficulty = np.array([float(row["instruction_difficulty"]) for row in rows])
        wins = np.array([float(row["preference"] or "nan") for row in rows])
        length = np.tanh([float(row["std_delta_len"]) for row in rows])
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} is no df_gamed.csv of tatsu-lab/alpaca_eval ({type(error).__name__}: {error}); it has the columns "
            f"{', '.join(sorted(_GAMED_COLUMNS))}"
        ) from error
    judged = ~np.isnan(wins)
    # The first of a place counts.
    difficulties = {
        place: float(value) for place, value in reversed(list(zip(places, difficulty, strict=True)))
    }
    return Gamed(length[judged], difficulty[judged], wins[judged], difficulties)


def read_difficulties(gamed: Gamed, reference: Path) -> dict[str, float]:
    """The difficulty of each instruction, where the official files know them by place alone.

    Args:
        reference: a file with the instructions in the official order, such as the baseline's model_outputs.json.

    Raises:
        DataError: it has another number of instructions than there are difficulties, or one twice.
    """
    try:
        instructions = [str(row["instruction"]) for row in json.loads(reference.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{reference}: expected a JSON list of rows with an instruction ({error})") from error
    if len(set(instructions)) != len(instructions) or set(range(len(instructions))) != set(
        gamed.difficulties
    ):
        raise DataError(
            f"{reference} has {len(instructions)} instructions, {len(set(instructions))} of them different, and the "
            f"file of difficulties {len(gamed.difficulties)}; difficulties go by place, so it must be the official "
            f"file of {NUM_INSTRUCTIONS}, in its order"
        )
    return {text: gamed.difficulties[place] for place, text in enumerate(instructions)}


def length_controlled(
    annotations: Sequence[Annotation],
    difficulties: Mapping[str, float],
    gamed: Gamed,
    strength: float | None = None,
) -> LengthControlled:
    """The length-controlled win rate of one model.

    Args:
        annotations: one for each instruction; those without a preference count in the rate and not in the fit.
        difficulties: by instruction.
        strength: C; None: chosen by cross-validation, as AlpacaEval does.

    Raises:
        DataError: instructions are missing or unknown, or two models have one name.
    """
    _require_all(annotations, difficulties)
    if annotations[0].model == annotations[0].baseline:
        if any(one.output != one.baseline_output for one in annotations):
            raise DataError(
                f"the model and its baseline are both called {annotations[0].model!r}, and AlpacaEval takes them for "
                "one; give generator_1 or generator_2 another name"
            )
        return LengthControlled(50.0, 0.0, math.nan, (0.0, 0.0, 0.0))
    own = np.array([difficulties[one.instruction] for one in annotations])
    rows = _training_rows(annotations, own, gamed)
    chosen = _cross_validated(rows) if strength is None else strength
    by_length, by_difficulty, by_model = _fit(rows, chosen)
    chances = 1 / (1 + np.exp(-(by_difficulty * own + by_model)))
    return LengthControlled(
        100 * float(chances.mean()),
        100 * standard_error(chances),
        chosen,
        (by_length, by_difficulty, by_model),
    )


def _require_all(annotations: Sequence[Annotation], difficulties: Mapping[str, float]) -> None:
    given = {one.instruction for one in annotations}
    unknown, missing = given - difficulties.keys(), difficulties.keys() - given
    problems = [f"{len(unknown)} are not in the reference, the first {min(unknown)!r:.80}"] if unknown else []
    problems += [f"{len(missing)} have no annotation, the first {min(missing)!r:.80}"] if missing else []
    refuse_if(
        problems, "the length-controlled rate is of exactly the instructions of the reference", DataError
    )


@dataclass(frozen=True)
class _Rows:
    features: np.ndarray  # [rows, 3]
    wins: np.ndarray  # [rows], from 0 to 1
    weights: np.ndarray  # [rows]


def _training_rows(annotations: Sequence[Annotation], own: np.ndarray, gamed: Gamed) -> _Rows:
    differences = np.array(
        [len(one.baseline_output) - len(one.output) for one in annotations], dtype=np.float64
    )
    lengths = np.tanh(differences / differences.std(ddof=1))  # standardised without taking the mean away
    # The baseline's gamed rows first, as there: which rows share a fold depends on the order.
    judged = np.array([one.preference is not None for one in annotations])
    given = (
        np.array([math.nan if one.preference is None else one.preference or 1.5 for one in annotations]) - 1
    )
    features = np.concatenate(
        [
            np.stack([gamed.length, gamed.difficulty, np.zeros_like(gamed.length)], axis=1),
            np.stack([lengths, own, np.ones_like(own)], axis=1)[judged],
        ]
    )
    weights = np.concatenate([np.full(len(gamed.wins), GAMED_WEIGHT), np.ones(int(judged.sum()))])
    return _Rows(features, np.concatenate([gamed.wins, given[judged]]), weights)


def _fit(rows: _Rows, strength: float) -> tuple[float, float, float]:
    """Fits to fractional labels: each row twice, as a win and as a loss, by their weights."""
    model = LogisticRegression(
        l1_ratio=1, C=strength, solver="liblinear", fit_intercept=False, random_state=_SEED
    )
    twice = np.concatenate([rows.features, rows.features])
    labels = np.concatenate([np.ones(len(rows.wins)), np.zeros(len(rows.wins))])
    weights = np.concatenate([rows.wins * rows.weights, (1 - rows.wins) * rows.weights])
    model.fit(twice, labels, sample_weight=weights)
    length, difficulty, is_model = (float(one) for one in model.coef_[0])
    return length, difficulty, is_model


def _cross_validated(rows: _Rows) -> float:
    """The strength with the least loss on rows that were left out."""
    numbers = np.arange(len(rows.wins))
    # Folds are of rows that come as a win and as a loss: grouped as there, which decides what lies in which.
    folds = list(GroupKFold(_NUM_FOLDS).split(np.tile(numbers, 2), groups=np.tile(numbers, 2)))
    losses = []
    for strength in STRENGTHS:
        of_folds = []
        for fitted, left_out in folds:
            kept, other = fitted[fitted < len(numbers)], left_out[left_out < len(numbers)]
            coefficients = _fit(_Rows(rows.features[kept], rows.wins[kept], rows.weights[kept]), strength)
            chances = 1 / (1 + np.exp(-rows.features[other] @ np.array(coefficients)))
            chances = np.clip(chances, 1e-15, 1 - 1e-15)
            won, weights = rows.wins[other], rows.weights[other]
            of_folds.append(-np.mean(weights * (won * np.log(chances) + (1 - won) * np.log(1 - chances))))
        losses.append(np.mean(of_folds))
    return STRENGTHS[int(np.argmin(losses))]
