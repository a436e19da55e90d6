"""The KL coefficient against golden numbers."""

import pytest
from algorithms.grids import GOLDEN

from rto_megatron.algorithms.kl_controller import KLController

ADAPTIVE = GOLDEN["adaptive_kl_controller"]


def test_adaptive_coefficients_equal_golden():
    controller = KLController(ADAPTIVE["init"], ADAPTIVE["target"], ADAPTIVE["horizon"])
    for kl, expected in zip(ADAPTIVE["currents"], ADAPTIVE["values"], strict=True):
        controller = controller.update(kl, ADAPTIVE["n_steps"])
        assert controller.coef == pytest.approx(expected, rel=1e-9)


def test_without_target_the_coefficient_is_fixed():
    assert KLController(0.01, None, 10000).update(5.0, 1024).coef == 0.01


def test_restored_controller_continues():
    fresh = KLController(0.01, 0.05, 10000)
    moved = fresh.update(5.0, 1024)
    assert fresh.restored(moved.state()) == moved
    assert moved.coef != fresh.coef


def test_fixed_controller_keeps_its_configuration_when_restored():
    assert KLController(0.02, None, 10000).restored({"coef": 0.01}).coef == 0.02
