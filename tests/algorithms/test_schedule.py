"""Learning-rate factors against golden numbers."""

import pytest
from algorithms.grids import GOLDEN

from rto_megatron.algorithms.schedule import lr_factor, warmup_steps

COSINE = GOLDEN["lr_cosine_with_min_lr"]


@pytest.mark.parametrize("step", COSINE["factors"])
def test_cosine_equals_golden(step):
    factor = lr_factor(
        int(step), COSINE["total_steps"], COSINE["warmup_steps"], COSINE["min_lr_rate"], "cosine"
    )
    assert factor == pytest.approx(COSINE["factors"][step], rel=1e-9)


def test_cosine_stays_at_its_floor_after_the_end():
    assert lr_factor(700, 468, 15, 0.1, "cosine") == pytest.approx(0.1)


def test_constant_follows_its_warmup_without_a_floor():
    assert [lr_factor(step, 100, 4, 0.1, "constant") for step in (0, 1, 3, 4, 99)] == [0, 0.25, 0.75, 1, 1]


def test_no_warmup_starts_at_the_peak():
    assert lr_factor(0, 10, 0, 0.1, "cosine") == 1


def test_run_that_is_all_warmup_does_not_divide_by_zero():
    assert lr_factor(5, 5, 5, 0.1, "cosine") == 1


@pytest.mark.parametrize(
    ("fraction", "total", "steps"), [(0.03, 468, 15), (0.07, 100, 7), (0.0, 10, 0), (0.03, 2, 1)]
)
def test_warmup_steps_round_up_only_what_is_not_whole(fraction, total, steps):
    assert warmup_steps(fraction, total) == steps


@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_the_last_step_of_any_run_has_a_rate(fraction, kind):
    for total in range(1, 40):
        warmup = warmup_steps(fraction, total)
        assert lr_factor(total - 1, total, warmup, 0.0, kind) > 0
        assert max(lr_factor(step, total, warmup, 0.0, kind) for step in range(total)) == 1
