"""A slow rank is named with its ratio to the median."""

import time
from pathlib import Path

import pytest
from ranks import run_ranks
from torch.nn.modules.module import register_module_forward_pre_hook
from trainer.tiny_runs import configure, join

from rto_megatron.config.schema import Stage
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.reporting.pace import RATIO, Pace, busiest, slow_rank, slowest
from rto_megatron.trainer.offline import train_offline
from rto_megatron.types import LossOutput


def test_the_slowest_is_compared_with_the_median_of_those_that_have_a_time() -> None:
    assert slowest([1.0, 4.0, 2.0]) == (1, 2.0)
    assert slowest([0.0, 3.0, 0.0, 1.0]) == (1, 3.0)  # stages without a loss
    assert slowest([5.0, 0.0]) is None
    assert slowest([5.0]) is None


def test_the_busiest_is_compared_with_the_mean() -> None:
    assert busiest([3e12, 1e12, 2e12]) == 1.5
    assert busiest([3e12]) is None
    assert busiest([0.0, 0.0]) is None


def test_a_warning_needs_a_ratio_and_seconds_that_matter() -> None:
    assert slow_rank([0.01, 0.05], 3) is None
    assert slow_rank([10.0, 15.0], 3) is None
    assert slow_rank([0.4, 0.4, 0.8], 3) is None  # 0.4 s more than the others
    said = slow_rank([1.0, 3.0], 3)
    assert said is not None and said.startswith(
        "warning: step 3: rank 1 needs 3.0 times as long as the median rank"
    )


def test_the_time_of_a_pass_ends_with_its_last_loss() -> None:
    clock = iter([10.0, 11.0, 14.0, 100.0, 102.0])
    one = Pace(lambda: next(clock))

    def loss(outputs: object, micro: object) -> LossOutput:
        return LossOutput(outputs, {})  # type: ignore[arg-type]

    first = one.timing(loss)
    first(None, None), first(None, None)  # type: ignore[func-returns-value]
    one.timing(loss)(None, None)  # type: ignore[arg-type]
    assert one.take() == 4.0 + 2.0
    assert one.take() == 0.0


def _slow_on_one(config: Stage) -> None:
    place = join(config)
    if place.rank == 1:
        register_module_forward_pre_hook(lambda module, inputs: time.sleep(0.02))
    train_offline(config, place)


def test_a_run_names_its_slow_rank(files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = configure("sft", files, tmp_path / "run", "dp2", run__steps=1, batch__micro=1)
    run_ranks(2, _slow_on_one, config)
    (entry,) = read_metrics(tmp_path / "run")
    assert entry[RATIO] > 2
    assert "warning: step 1: rank 1 needs" in capfd.readouterr().out
