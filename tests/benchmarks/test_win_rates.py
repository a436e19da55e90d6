"""AlpacaEval's win rates against golden numbers, and from files as alpaca_eval writes them."""

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.made_files import GOLDEN, rto, write_json

from rto_megatron.benchmarks.win_rates import bootstrap_interval, read_annotations, win_rate
from rto_megatron.errors import DataError, RunFolderError


def annotations(path: Path, preferences: list[float | None]) -> Path:
    """Rows as they are in official files, with columns that are not read."""
    rows = [
        {
            "instruction": f"i{number}", "output_1": "base", "generator_1": "gpt4_1106_preview", "dataset": "koala",
            "output_2": "ours!", "generator_2": "ours", "annotator": "weighted_alpaca_eval_gpt4_turbo",
            "preference": preference, "raw_completion": {"text": "m"}, "price_per_example": 0.01,
        }
        for number, preference in enumerate(preferences)
    ]  # fmt: skip
    return write_json(path, rows)


def test_rates_equal_golden_numbers_through_the_command(tmp_path: Path) -> None:
    golden = GOLDEN["ae_winrate"]
    path = annotations(tmp_path / "annotations.json", golden["preferences"])
    shown = rto("score", path, "--json", tmp_path / "scores.json")
    (scored,) = json.loads((tmp_path / "scores.json").read_text())["alpaca_eval"]
    rate = scored["rate"]
    for ours, theirs in (
        ("win_rate", "win_rate"), ("standard_error", "standard_error"), ("discrete_win_rate", "discrete_win_rate"),
        ("num_wins", "n_wins"), ("num_losses", "n_wins_base"), ("num_ties", "n_draws"),
    ):  # fmt: skip
        assert rate[ours] == pytest.approx(golden[theirs], rel=1e-12), ours
    assert (rate["num_unjudged"], rate["characters"]) == (1, 5)
    assert "51.67 ± 15.79" in shown and "6, 1 not" in shown


def test_a_folder_in_place_of_the_numbers_file_is_told(tmp_path: Path) -> None:
    path = annotations(tmp_path / "annotations.json", [1.0, 2.0])
    with pytest.raises(RunFolderError, match="is a folder; expected the name of a file to write"):
        rto("score", path, "--json", tmp_path)


def test_a_nan_is_a_row_without_a_verdict(tmp_path: Path) -> None:
    path = annotations(tmp_path / "annotations.json", [1.0, 2.0])
    path.write_text(path.read_text().replace("1.0", "NaN"))
    assert win_rate(read_annotations(path)).win_rate == 100


@pytest.mark.parametrize(
    ("preferences", "said"),
    [
        ([1.0, 0.5], "row 2.*0.5, expected a number from 1 to 2"),
        ([1.0, 2.5], "row 2.*2.5, expected a number from 1 to 2"),
        ([None, None], "never gave a verdict"),
    ],
)
def test_files_that_hold_no_verdicts_are_refused(
    preferences: list[float | None], said: str, tmp_path: Path
) -> None:
    path = annotations(tmp_path / "annotations.json", preferences)
    with pytest.raises(DataError, match=said):
        rto("score", path)


def test_an_empty_list_and_no_list_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    write_json(path, [])
    with pytest.raises(DataError, match=r"expected a list of annotations, found an empty one; .*judge"):
        read_annotations(path)
    write_json(path, {})
    with pytest.raises(DataError, match="expected a list of annotations, found dict"):
        read_annotations(path)


def test_rows_of_two_models_and_rows_twice_are_named_together(tmp_path: Path) -> None:
    path = annotations(tmp_path / "annotations.json", [1.0, 2.0, 1.5])
    rows = json.loads(path.read_text())
    rows[1]["generator_2"] = "others"
    rows[2]["instruction"] = "i0"
    write_json(path, rows)
    with pytest.raises(DataError, match=r"(?s)'i0' is annotated more than once.*others"):
        read_annotations(path)


def test_bootstrap_of_a_mean_lies_where_its_standard_error_says() -> None:
    values = np.random.default_rng(0).random(400)
    low, high = bootstrap_interval(values, num_rounds=2000, seed=1)
    error = values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
