"""Differences of outputs, by hand."""

import math

import pytest
import torch

from rto_megatron.convert.logits_error import compare


def test_the_errors_of_known_logits_are_those_of_the_definition() -> None:
    base = [torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])]
    other = [torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 1.0]])]
    error = compare(base, other)
    assert error.num_outputs == 3
    assert error.mean_abs == pytest.approx((math.log(3.0) + 2.0) / 6)
    assert error.max_abs == 2.0
    p, q = 1 / (1 + math.e), math.e / (1 + math.e)  # of the first and second token in the last row
    last = p * math.log(p / q) + q * math.log(q / p)
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert error.mean_kl_nats == pytest.approx((first + last) / 3, rel=1e-6)
    assert error.top1_agreement == pytest.approx(2 / 3)


@pytest.mark.parametrize("place", [0, 1])
def test_an_output_that_is_no_number_shows_in_the_mean_and_in_the_largest(place: int) -> None:
    base = [torch.zeros(1, 2), torch.zeros(1, 2)]
    other = [torch.ones(1, 2), torch.ones(1, 2)]
    other[place][0, 1] = math.nan
    error = compare(base, other)
    assert math.isnan(error.mean_abs) and math.isnan(error.max_abs)
    assert error.mean_kl_nats is not None and math.isnan(error.mean_kl_nats)
