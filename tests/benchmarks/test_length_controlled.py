"""The length-controlled win rate: golden fits, folds, and the files that it needs."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.made_files import GOLDEN, rto, write_json
from scipy.optimize import minimize

from rto_megatron.benchmarks.length_controlled import (
    STRENGTHS,
    Gamed,
    length_controlled,
    read_difficulties,
    read_gamed,
)
from rto_megatron.benchmarks.win_rates import Annotation
from rto_megatron.errors import DataError, RecipeError

INPUTS = GOLDEN["ae_lc_glm"]["inputs"]
NUM_ROWS = len(INPUTS["preference"])
FITS = GOLDEN["ae_lc_glm"]["fits_by_C"]


def rows(model: str = "ours") -> list[Annotation]:
    return [
        Annotation(f"i{place}", "b" * int(first), "m" * int(second), preference, "base", model)
        for place, (first, second, preference) in enumerate(
            zip(
                INPUTS["len_output_1_baseline"],
                INPUTS["len_output_2_model"],
                INPUTS["preference"],
                strict=True,
            )
        )
    ]


def gamed() -> Gamed:
    places = dict(enumerate(INPUTS["instruction_difficulty"]))
    columns = ("gamed_tanh_len", "gamed_instruction_difficulty", "gamed_preference_0_1")
    length, difficulty, wins = (np.array(INPUTS[name]) for name in columns)
    return Gamed(length, difficulty, wins, places)


def difficulties() -> dict[str, float]:
    return {f"i{place}": value for place, value in enumerate(INPUTS["instruction_difficulty"])}


@pytest.mark.parametrize("strength", FITS)
def test_fits_equal_golden_numbers(strength: str) -> None:
    found = length_controlled(rows(), difficulties(), gamed(), float(strength))
    golden = FITS[strength]
    wanted = [golden[f"coef_{name}"] for name in ("tanh_len", "difficulty", "bias")]
    assert found.coefficients == pytest.approx(wanted, abs=2e-3)
    assert found.win_rate == pytest.approx(golden["length_controlled_winrate"], abs=0.05)
    assert found.standard_error == pytest.approx(golden["lc_standard_error"], abs=0.02)


def test_a_row_without_a_preference_is_rated_and_not_fitted() -> None:
    """The added row leaves the deviation of all lengths as it was, so that the fit is the golden one."""
    differences = np.array(INPUTS["len_output_1_baseline"]) - np.array(INPUTS["len_output_2_model"])
    far = round(differences.mean() + differences.std(ddof=1) * math.sqrt((NUM_ROWS + 1) / NUM_ROWS))
    added = Annotation("new", "b" * (far + 1), "m", None, "base", "ours")
    strength, golden = next(iter(FITS.items()))
    found = length_controlled([*rows(), added], {**difficulties(), "new": 1.0}, gamed(), float(strength))
    assert found.coefficients[0] == pytest.approx(golden["coef_tanh_len"], abs=2e-3)
    of_new = 1 / (1 + math.exp(-golden["coef_difficulty"] - golden["coef_bias"]))
    wanted = (NUM_ROWS * golden["length_controlled_winrate"] + 100 * of_new) / (NUM_ROWS + 1)
    assert found.win_rate == pytest.approx(wanted, abs=0.05)


def test_the_tie_of_early_files_is_a_tie() -> None:
    """They write 0 for it, where later ones have 1.5."""
    found = [
        length_controlled([replace(first, preference=tie), *others], difficulties(), gamed(), 1.0)
        for first, *others in [rows()]
        for tie in (0.0, 1.5)
    ]
    assert found[0] == found[1]


def test_the_strength_is_that_of_the_least_loss_on_folds_left_out() -> None:
    """A slow loop of the definition: an own optimiser on the golden rows, folds as GroupKFold deals them."""
    from sklearn.model_selection import GroupKFold

    differences = np.array(INPUTS["len_output_1_baseline"]) - np.array(INPUTS["len_output_2_model"])
    own = np.tanh(differences / differences.std(ddof=1))
    features = [
        *(
            [a, b, 0.0]
            for a, b in zip(INPUTS["gamed_tanh_len"], INPUTS["gamed_instruction_difficulty"], strict=True)
        ),
        *([a, b, 1.0] for a, b in zip(own, INPUTS["instruction_difficulty"], strict=True)),
    ]
    wins = [*INPUTS["gamed_preference_0_1"], *(p - 1 for p in INPUTS["preference"])]
    weights = [*([0.1] * len(INPUTS["gamed_tanh_len"])), *([1.0] * NUM_ROWS)]
    groups = [*range(len(wins)), *range(len(wins))]
    folds = [
        sorted({groups[one] for one in left_out})
        for _, left_out in GroupKFold(5).split(groups, groups=groups)
    ]

    def loss(w: np.ndarray, row: int) -> float:
        z = float(np.dot(features[row], w))
        return weights[row] * (
            wins[row] * math.log1p(math.exp(-z)) + (1 - wins[row]) * math.log1p(math.exp(z))
        )

    def fit(kept: list[int], strength: float) -> np.ndarray:
        # The penalty |w| as the sum of two parts that must not be negative.
        def objective(parts: np.ndarray) -> float:
            return float(parts.sum()) + strength * sum(loss(parts[:3] - parts[3:], row) for row in kept)

        found = minimize(objective, np.full(6, 0.1), method="L-BFGS-B", bounds=[(0, None)] * 6)
        return np.asarray(found.x[:3] - found.x[3:])

    losses = []
    for strength in STRENGTHS:
        of_folds = []
        for fold in folds:
            w = fit([row for row in range(len(wins)) if row not in fold], strength)
            of_folds.append(np.mean([loss(w, row) for row in fold]))
        losses.append(np.mean(of_folds))
    best = STRENGTHS[int(np.argmin(losses))]
    assert length_controlled(rows(), difficulties(), gamed()).strength == best


def test_the_baseline_against_itself_is_at_50() -> None:
    own = [replace(one, output=one.baseline_output) for one in rows(model="base")]
    assert length_controlled(own, difficulties(), gamed()).win_rate == 50


def test_another_model_of_the_baseline_s_name_is_refused() -> None:
    with pytest.raises(DataError, match="both called 'base'"):
        length_controlled(rows(model="base"), difficulties(), gamed())


def write_official(folder: Path) -> tuple[Path, Path, Path]:
    """The three files of the golden rows: annotations, df_gamed.csv, the reference in the official order."""
    annotated = [
        {
            "instruction": one.instruction, "output_1": one.baseline_output, "output_2": one.output,
            "preference": one.preference, "generator_1": one.baseline, "generator_2": one.model,
        }
        for one in reversed(rows())
    ]  # fmt: skip
    table = folder / "df_gamed.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [
            "index",
            "preference",
            "std_delta_len",
            "instruction_difficulty",
            "not_gamed_baseline",
            "model",
        ]
        writer.writerow(names)
        zipped = zip(INPUTS["gamed_tanh_len"], INPUTS["gamed_preference_0_1"], strict=True)
        for place, (length, won) in enumerate(zipped):
            difficulty = INPUTS["gamed_instruction_difficulty"][place]
            writer.writerow([place, won, math.atanh(length), difficulty, False, "gpt4_gamed"])
    order = write_json(folder / "reference.json", [{"instruction": f"i{place}"} for place in range(16)])
    return write_json(folder / "annotations.json", annotated), table, order


def test_difficulties_go_by_instruction_whatever_the_order_of_annotations(tmp_path: Path) -> None:
    _, table, order = write_official(tmp_path)
    read = read_gamed(table)
    assert read_difficulties(read, order) == {
        f"i{place}": pytest.approx(value)
        for place, value in enumerate(INPUTS["gamed_instruction_difficulty"])
    }
    assert read.length == pytest.approx(INPUTS["gamed_tanh_len"])


def test_another_number_of_instructions_is_refused(tmp_path: Path) -> None:
    annotated, table, order = write_official(tmp_path)
    with pytest.raises(DataError, match="8 are not in the reference, the first 'i16'"):
        rto("score", annotated, "--gamed", table, "--reference", order)
    write_json(order, json.loads(order.read_text())[1:])
    with pytest.raises(DataError, match="15 instructions, 15 of them different"):
        rto("score", annotated, "--gamed", table, "--reference", order)
    with pytest.raises(RecipeError, match="belong together"):
        rto("score", annotated, "--gamed", table)


def test_the_command_shows_the_rate_and_that_it_is_unverified(tmp_path: Path) -> None:
    annotated, table, order = write_official(tmp_path)
    write_json(
        annotated, [row for row in json.loads(annotated.read_text()) if int(row["instruction"][1:]) < 16]
    )
    shown = rto("score", annotated, "--gamed", table, "--reference", order, "--json", tmp_path / "s.json")
    (scored,) = json.loads((tmp_path / "s.json").read_text())["alpaca_eval"]
    assert f"{scored['controlled']['win_rate']:.2f}" in shown
    assert "unverified" in shown
