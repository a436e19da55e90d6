"""Policy and value losses with gradients, weights and sums per sequence."""

from dataclasses import replace

import pytest
import torch
from algorithms.grids import GARBAGE, GOLDEN, PROMPT_LENGTH, close, grid, ppo_minibatch, ragged_batch, to_grid
from algorithms.grids import to_positions as spread

from rto_megatron.algorithms import losses, policy_losses

MASK = grid(GOLDEN["ppo_policy_inputs"]["action_mask"])
SEQUENCE_MEAN = losses.sequence_mean_weights(MASK, 2.0)
TOKEN_MEAN = losses.token_mean_weights(MASK, 8.0)
LAYOUTS = pytest.mark.parametrize("packed", [True, False])


def _leaf(values, batch, padding=GARBAGE):
    return spread(grid(values), batch, PROMPT_LENGTH, padding).requires_grad_()


def _policy(weight_BR, packed, padding=GARBAGE):
    minibatch = ppo_minibatch(weight_BR, packed, padding)
    logp_T = _leaf(GOLDEN["ppo_policy_inputs"]["new_logp"], minibatch.batch, -padding)
    output = policy_losses.clipped_policy_loss(logp_T, minibatch, 0.2)
    output.loss.backward()
    return output, logp_T.grad, minibatch.batch


def _value(value_clip, packed, padding=GARBAGE):
    minibatch = ppo_minibatch(SEQUENCE_MEAN, packed, padding)
    values_T = _leaf(GOLDEN["ppo_value_inputs"]["new_values"], minibatch.batch, -padding)
    output = losses.clipped_value_loss(values_T, minibatch, value_clip)
    output.loss.backward()
    return output, values_T.grad, minibatch.batch


@LAYOUTS
def test_policy_loss_and_gradient_equal_golden(packed):
    output, grad_T, batch = _policy(SEQUENCE_MEAN, packed)
    close(output.loss, GOLDEN["ppo_policy_loss"]["loss"])
    close(to_grid(grad_T, batch, PROMPT_LENGTH, 6), GOLDEN["ppo_policy_loss"]["grad_new_logp"])


def test_policy_loss_with_token_mean_equals_golden():
    close(_policy(TOKEN_MEAN, True)[0].loss, GOLDEN["ppo_policy_loss"]["token_mean_variant"])


@LAYOUTS
def test_policy_metrics_are_means_over_action_tokens(packed):
    inputs = GOLDEN["ppo_policy_inputs"]
    pairs = zip(inputs["new_logp"], inputs["old_logp"], strict=True)
    lengths = (5, 3)
    log_ratios = grid(
        [
            n - o
            for (new, old), k in zip(pairs, lengths, strict=True)
            for n, o in zip(new[:k], old[:k], strict=True)
        ]
    )
    metrics = _policy(SEQUENCE_MEAN, packed)[0].metrics
    assert metrics["policy/clipfrac_avg"] == (8 * GOLDEN["ppo_policy_loss"]["clip_fraction"], 8)
    assert metrics["policy/approxkl_avg"] == pytest.approx((0.5 * (log_ratios**2).sum().item(), 8), rel=1e-9)
    assert metrics["val/ratio"] == pytest.approx((log_ratios.exp().sum().item(), 8), rel=1e-9)
    assert metrics["loss/policy_avg"] == pytest.approx((GOLDEN["ppo_policy_loss"]["loss"], 1), rel=1e-9)


@LAYOUTS
def test_clipped_value_loss_and_gradient_equal_golden(packed):
    output, grad_T, batch = _value(0.2, packed)
    close(output.loss, GOLDEN["ppo_value_loss_clipped"]["loss"])
    close(to_grid(grad_T, batch, PROMPT_LENGTH, 6), GOLDEN["ppo_value_loss_clipped"]["grad_new_values"])


@LAYOUTS
def test_unclipped_value_loss_equals_golden(packed):
    output, _, _ = _value(None, packed)
    close(output.loss, GOLDEN["ppo_value_loss_unclipped"]["loss"])
    assert output.metrics["val/clipfrac_avg"] == (0, 8)


def test_value_clip_fraction_counts_tokens_whose_clipped_error_is_larger():
    value, returns = GOLDEN["ppo_value_inputs"], GOLDEN["gae_gamma1_lambda0.95"]["returns"]
    num_clipped = 0
    for row, length in enumerate((5, 3)):
        for t in range(length):
            new, old, target = value["new_values"][row][t], value["old_values"][row][t], returns[row][t]
            clipped = old + min(max(new - old, -0.2), 0.2)
            num_clipped += (clipped - target) ** 2 > (new - target) ** 2
    metrics = _value(0.2, True)[0].metrics
    assert metrics["val/clipfrac_avg"] == (num_clipped, 8)
    assert 0 < num_clipped < 8
    assert metrics["loss/value_avg"] == pytest.approx((GOLDEN["ppo_value_loss_clipped"]["loss"], 1), rel=1e-9)


@LAYOUTS
@pytest.mark.parametrize("padding", [GARBAGE, -GARBAGE, 1e300])
def test_padding_does_not_change_loss_or_gradient(packed, padding):
    for run in (lambda p: _policy(SEQUENCE_MEAN, packed, p), lambda p: _value(0.2, packed, p)):
        (clean, clean_grad_T, _), (dirty, dirty_grad_T, _) = run(0.0), run(padding)
        assert torch.equal(clean.loss, dirty.loss)
        assert torch.equal(clean_grad_T, dirty_grad_T)
        assert clean.metrics == dirty.metrics


def test_losses_keep_the_dtype_of_their_inputs():
    for output in (_policy(SEQUENCE_MEAN, True)[0], _value(0.2, True)[0]):
        assert output.loss.dtype == torch.float64


def test_sequence_mean_weights_are_the_mean_of_means():
    close(losses.count_sequences(MASK), 2.0)
    close(SEQUENCE_MEAN, [[0.1] * 5 + [0.0], [1 / 6] * 3 + [0.0] * 3])


def test_token_mean_weights_are_equal():
    close(losses.count_tokens(MASK), 8.0)
    close(TOKEN_MEAN, [[0.125] * 5 + [0.0], [0.125] * 3 + [0.0] * 3])


def test_masked_out_response_has_no_weight_and_is_not_counted():
    mask_BR = grid([[1, 1, 0], [0, 0, 0]])
    close(losses.count_sequences(mask_BR), 1.0)
    close(losses.sequence_mean_weights(mask_BR, 1.0), [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])


def test_nothing_to_train_on_gives_zero_weights():
    mask_BR = torch.zeros(2, 3)
    for name in ("sequence_mean", "token_mean", "constant"):
        weighting = losses.weighting_of(name, 5)
        assert not weighting.weights(mask_BR, weighting.count(mask_BR).item()).any()


@pytest.mark.parametrize(
    ("name", "total"), [("sequence_mean", 1.0), ("token_mean", 1.0), ("constant", 8 / 14)]
)
def test_weights_of_split_batch_are_those_of_the_whole(name, total):
    weighting = losses.weighting_of(name, 7)
    whole = sum(weighting.count(row).item() for row in MASK.split(1))
    parts = [weighting.weights(row, whole) for row in MASK.split(1)]
    close(torch.cat(parts), weighting.weights(MASK, weighting.count(MASK).item()).tolist())
    close(torch.cat(parts).sum(), total)  # of two responses of 5 and 3 tokens


@LAYOUTS
def test_sequence_sums_add_each_sequence_and_skip_padding(packed):
    batch = ragged_batch((4, 2, 3), packed)
    rows = grid([[1.0, 2.0, 4.0], [8.0, 0.0, 0.0], [16.0, 32.0, 0.0]])
    mask_T = spread(torch.ones_like(rows), batch, 1, 0.0)
    sums_S = losses.sequence_sums(spread(rows, batch, 1, GARBAGE), mask_T, batch)
    close(sums_S, [7.0, 8.0, 48.0])


def test_values_that_moved_less_than_the_clip_are_not_counted_for_rounding():
    minibatch = ppo_minibatch(SEQUENCE_MEAN, True, 0.0)
    values_T = 0.1 * torch.sin(torch.arange(len(minibatch.weight_T))).float()
    old_T, returns_T = torch.full_like(values_T, 3.0), torch.full_like(values_T, -1.0)
    # What the clip leaves alone comes back as another number, whose error is greater for some.
    assert ((old_T + (values_T - old_T)) > values_T)[minibatch.weight_T > 0].any()
    single = replace(minibatch, values_old_T=old_T, returns_T=returns_T)
    assert losses.clipped_value_loss(values_T, single, 10.0).metrics["val/clipfrac_avg"] == (0, 8)
