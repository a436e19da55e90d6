"""Bradley-Terry loss and score statistics against golden numbers."""

from dataclasses import replace

import pytest
import torch
from algorithms.grids import GARBAGE, GOLDEN, close, grid, ragged_batch

from rto_megatron.algorithms.reward_model import Config, RewardModel, reward_statistics
from rto_megatron.types import PairMicrobatch

INPUTS = GOLDEN["bt_reward_inputs"]
LENGTHS = (4, 2, 5, 3, 6, 2, 3, 4)
LAYOUTS = pytest.mark.parametrize("packed", [True, False])


def _micro(packed):
    batch = ragged_batch(LENGTHS, packed)
    values_T = torch.full((batch.cu_seqlens[-1],), GARBAGE, dtype=torch.float64)
    values_T[list(batch.last_positions)] = grid(INPUTS["chosen_reward"] + INPUTS["rejected_reward"])
    zeros = torch.zeros_like(values_T)
    micro = PairMicrobatch(batch, zeros, grid([0.25] * 4), grid(INPUTS["margin"]), grid([0.0] * 8))
    return values_T.requires_grad_(), micro


@LAYOUTS
def test_loss_and_gradient_equal_golden(packed):
    values_T, micro = _micro(packed)
    output = RewardModel(Config()).loss(values_T, micro)
    output.loss.backward()
    close(output.loss, GOLDEN["bt_reward_loss"]["loss_mean"])
    grad_chosen = grid(GOLDEN["bt_reward_loss"]["grad_chosen"])
    close(values_T.grad[list(micro.batch.last_positions)], torch.cat([grad_chosen, -grad_chosen]).tolist())
    close(values_T.grad.abs().sum(), 2 * grad_chosen.abs().sum().item())


def test_loss_with_margin_equals_golden():
    close(
        RewardModel(Config(margin=True)).loss(*_micro(True)).loss,
        GOLDEN["bt_reward_loss_margin"]["loss_mean"],
    )


def test_metrics_are_sums_over_pairs():
    metrics = RewardModel(Config()).loss(*_micro(False)).metrics
    scores = INPUTS["chosen_reward"] + INPUTS["rejected_reward"]
    assert metrics["accuracy"] == (4 * GOLDEN["bt_reward_loss"]["accuracy"], 4)
    assert metrics["margin"] == pytest.approx((0.5 - 0.7 + 2.8 + 12.0, 4))
    assert metrics["mean_reward"] == pytest.approx((sum(scores), 8))
    assert metrics["mean_squared_reward"] == pytest.approx((sum(score**2 for score in scores), 8))
    assert metrics["loss"] == pytest.approx((GOLDEN["bt_reward_loss"]["loss_mean"], 1), rel=1e-9)


def test_pair_of_weight_zero_counts_nowhere():
    values_T, micro = _micro(True)
    short = replace(micro, weight_P=grid([0.25, 0.25, 0.25, 0.0]))
    output = RewardModel(Config()).loss(values_T, short)
    close(output.loss, sum(GOLDEN["bt_reward_loss"]["losses"][:3]) / 4)
    assert output.metrics["accuracy"] == (2, 3)
    assert output.metrics["ties"] == (0, 3)
    assert output.metrics["mean_reward"] == pytest.approx((1.2 - 0.3 + 0.8 + 0.7 + 0.4 - 2.0, 6))


def test_pairs_of_equal_scores_are_ties_and_not_won():
    values_T, micro = _micro(True)
    equal_T = torch.where(torch.arange(len(values_T)) == micro.batch.last_positions[4], 1.2, values_T)
    assert INPUTS["chosen_reward"][0] == 1.2
    metrics = RewardModel(Config()).loss(equal_T, micro).metrics
    assert (metrics["ties"], metrics["accuracy"]) == ((1, 4), (2, 4))


def test_statistics_of_the_metrics_normalise_like_golden():
    golden = GOLDEN["reward_mean_std"]
    metrics = RewardModel(Config()).loss(*_micro(True)).metrics
    total, count = metrics["mean_reward"]
    mean, std = reward_statistics(count, total, metrics["mean_squared_reward"][0])
    close(grid([mean, std]), [golden["mean"], golden["std_unbiased"]])
    close((grid(golden["rewards"]) - mean) / std, golden["normalized"])


def test_statistics_of_one_score_are_an_error():
    with pytest.raises(ValueError, match=r"at least 2 scores, got 1"):
        reward_statistics(1, 0.3, 0.09)


def test_statistics_of_equal_scores_do_not_divide_by_zero():
    assert reward_statistics(3, 0.3, 0.03) == pytest.approx((0.1, 1e-8))
