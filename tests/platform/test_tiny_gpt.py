"""Real megatron-core trains here: every layout gives the losses of one rank."""

import pytest
import tiny_gpt
from ranks import run_ranks
from tiny_gpt import Layout


def _losses(layout: Layout) -> list[float]:
    tiny_gpt.start(layout)
    trainee = tiny_gpt.build(layout)
    return [tiny_gpt.train_step(trainee, step) for step in range(3)]


@pytest.fixture(scope="module")
def one_rank() -> list[float]:
    return run_ranks(1, _losses, Layout())[0]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, Layout(recompute=True)),
        (1, Layout(distributed_optimizer=False)),
        (2, Layout(tp=2)),
        (2, Layout(tp=2, overlap=True, distributed_optimizer=False)),
    ],
)
def test_the_layout_does_not_change_the_losses(one_rank, world_size, layout):
    for losses in run_ranks(world_size, _losses, layout):
        assert losses == pytest.approx(one_rank, abs=2e-5)


def test_recomputation_draws_the_same_dropout():
    plain = run_ranks(1, _losses, Layout(dropout=0.1))
    recomputed = run_ranks(1, _losses, Layout(dropout=0.1, recompute=True))
    assert recomputed == plain
