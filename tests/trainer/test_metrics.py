"""Metrics are reduced once, by sum and count, and survive a resume."""

import json
from pathlib import Path

import pytest
import torch

from rto_megatron.engine.exchange import add
from rto_megatron.reporting.metrics import MetricLog, read_metrics, reduce_metrics


def test_sums_and_counts_are_added_before_dividing() -> None:
    total = add({"loss": (6.0, 2.0)}, {"loss": (1.0, 3.0), "kl": (4.0, 2.0)})
    assert total == {"loss": (7.0, 5.0), "kl": (4.0, 2.0)}


def test_reduction_is_the_mean_over_all_ranks_even_if_one_lacks_a_name() -> None:
    other_rank = torch.tensor([[3.0, 1.0], [1.0, 8.0], [0.0, 0.0]], dtype=torch.float64)
    means = reduce_metrics(
        {"loss": (6.0, 2.0)}, lambda own: own + other_rank, lambda own: ("kl", "loss", "never")
    )
    assert means == {"kl": 3.0, "loss": pytest.approx(0.7)}


def test_log_appends_one_object_a_step(tmp_path: Path) -> None:
    with MetricLog(tmp_path) as log:
        log.write(1, {"loss": 0.5})
        log.write(2, {"loss": float("nan"), "kl": 0.25})
    entries = read_metrics(tmp_path)
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(1, 0.5), (2, None)]
    assert entries[1]["kl"] == 0.25
    assert entries[0]["time"] > 1e9
    assert list((tmp_path / "tensorboard").iterdir())


def test_resume_drops_the_steps_after_the_checkpoint_and_a_cut_line(tmp_path: Path) -> None:
    with MetricLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with MetricLog(tmp_path, resumed_step=2) as log:
        log.write(3, {"loss": 30.0})
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
