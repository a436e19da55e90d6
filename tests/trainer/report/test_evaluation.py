"""The final table and what it says of RTO."""

import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from rto_megatron.errors import RunFolderError
from rto_megatron.reporting.evaluation import (
    Estimate,
    Evaluation,
    estimate,
    final_table,
    read_evaluations,
    save_evaluation,
    verdict,
)


def row(name: str, mean: float, standard_error: float = 0.1) -> Evaluation:
    other = Estimate(1.0, 0.1)
    return Evaluation(name, Estimate(mean, standard_error), other, other, other, 64, 128)


def test_standard_error_is_the_sample_deviation_over_root_n() -> None:
    values = [1.0, 4.0, 2.0, 7.0]
    found = estimate(values)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.standard_error == pytest.approx(statistics.stdev(values) / 2)
    assert math.isnan(estimate([1.0]).standard_error)


def test_evaluations_are_read_back_in_the_order_of_the_stages(tmp_path: Path) -> None:
    saved = [row("RTO", 2.0), row("other", 0.0), row("SFT", 1.0), row("PPO", 1.5)]
    for evaluation in saved:
        save_evaluation(evaluation, tmp_path / "evaluations" / evaluation.name)
    found = read_evaluations(tmp_path)
    assert [evaluation.name for evaluation in found] == ["SFT", "PPO", "RTO", "other"]
    assert found[0] == saved[2]
    assert final_table(found, "t").row_count == 4


def test_true_returns_have_a_column_where_one_is_known() -> None:
    known, unknown = row("SFT", 1.0), replace(row("RTO", 2.0), true_return=None)
    for rows, has_column in (([unknown], False), ([known, unknown], True)):
        table = final_table(rows, "t")
        assert ("true return" in [str(column.header) for column in table.columns]) == has_column
        assert all(len([*column.cells]) == len(rows) for column in table.columns)


def test_missing_and_cut_evaluations_are_explained(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="run the evaluate recipe first"):
        read_evaluations(tmp_path)
    path = save_evaluation(row("SFT", 1.0), tmp_path)
    path.write_text(path.read_text()[:40])
    with pytest.raises(RunFolderError, match="is not a complete evaluation"):
        read_evaluations(tmp_path)


def test_verdict_counts_standard_errors_of_the_difference() -> None:
    # sqrt(0.3^2 + 0.4^2) = 0.5, so 1.6 is 3.2 standard errors and 1.4 is 2.8.
    assert "beats SFT by more than three" in verdict([row("SFT", 0.0, 0.3), row("RTO", 1.6, 0.4)])
    assert "does not beat SFT by three" in verdict([row("SFT", 0.0, 0.3), row("RTO", 1.4, 0.4)])
    assert "RTO against PPO: -1.0" in verdict(
        [row("SFT", 0, 0.3), row("PPO", 2.1, 0.3), row("RTO", 1.6, 0.4)]
    )
    assert "No verdict" in verdict([row("SFT", 0.0)])


def test_means_that_do_not_scatter_or_whose_scatter_is_unknown_are_no_victory() -> None:
    assert "does not beat SFT by three standard errors of the difference (+0.0)" in verdict(
        [row("SFT", 1.0, 0.0), row("RTO", 1.0, 0.0)]
    )
    assert "does not beat SFT by three standard errors of the difference (-inf)" in verdict(
        [row("SFT", 1.0, 0.0), row("RTO", 0.5, 0.0)]
    )
    assert "(+inf)" in verdict([row("SFT", 0.5, 0.0), row("RTO", 1.0, 0.0)])
    # Of one prompt.
    assert "does not beat SFT" in verdict([row("SFT", 1.0, math.nan), row("RTO", 0.5, math.nan)])


def test_of_several_evaluations_of_one_name_none_is_picked() -> None:
    rows = [row("SFT", 0.0), row("RTO", 5.0), row("rto", -5.0)]
    assert verdict(rows).startswith("No verdict: several evaluations are called rto;")


def test_without_true_returns_each_source_that_both_were_given_is_compared() -> None:
    def rated(name: str, **means: float) -> Evaluation:
        rewards = {source: Estimate(mean, 0.3) for source, mean in means.items()}
        return replace(row(name, 0.0), true_return=None, rewards=rewards)

    # 0.3 * sqrt(2) = 0.424, so 0.6 is 1.4 of them and -0.3 is -0.7.
    said = verdict(
        [rated("start", rules=0.4), rated("ppo", rules=1.3, model=2.0), rated("RTO", rules=1.0, style=1.0)]
    )
    assert said == "RTO by rules, in standard errors of the difference: +1.4 against start, -0.7 against ppo."
    assert "No verdict" in verdict([rated("start", rules=0.4), rated("ppo", rules=1.0)])
