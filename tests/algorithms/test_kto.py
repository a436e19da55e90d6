"""KTO against a slow loop of arXiv 2402.01306, eq. 8, and against TRL 1.16.

TRL's `KTOTrainer._compute_loss` can be called unbound, its estimate of the KL baseline included. Its answers have one
token here, ours have several that add up to the same log-prob.
"""

import math
from dataclasses import replace

import pytest
import torch
from algorithms.grids import GARBAGE, close, grid, ragged_batch, to_positions
from algorithms.trl_losses import trl_kto
from pydantic import ValidationError

from rto_megatron.algorithms.kto import KTO, Config, kl_baseline
from rto_megatron.types import JudgedMicrobatch

PROMPT_LENGTH = 2
LENGTHS = (4, 1, 7, 3, 5)
POLICY = [-9.5, -2.25, -20.0, -4.0, -7.5]
REFERENCE = [-10.0, -2.0, -23.5, -3.0, -7.75]
IS_DESIRABLE = [True, False, False, True, True]
UNRELATED = ([-30.0, -12.0, -18.5, -9.0, -11.0], [-31.5, -11.0, -19.0, -9.25, -13.0])
LAYOUTS = pytest.mark.parametrize("packed", [True, False])
CONFIGS = pytest.mark.parametrize(
    "config",
    [Config(), Config(beta=0.5, desirable_weight=1.25), Config(beta=0.3, undesirable_weight=4.0)],
    ids=["paper", "desirable", "undesirable"],
)


def _micro(packed=True, baseline=0.65, padding=GARBAGE):
    batch = ragged_batch(tuple(PROMPT_LENGTH + length for length in LENGTHS), packed)
    tokens_S1 = (grid(POLICY) / grid(LENGTHS)).unsqueeze(1)
    logp_T = to_positions(tokens_S1.expand(-1, max(LENGTHS)), batch, PROMPT_LENGTH, padding)
    mask_T = to_positions(torch.ones(5, max(LENGTHS)).double(), batch, PROMPT_LENGTH, 0.0)
    desirable_S = torch.tensor(IS_DESIRABLE)
    micro = JudgedMicrobatch(batch, mask_T, grid([0.2] * 5), desirable_S, grid(REFERENCE), grid(baseline))
    return logp_T.requires_grad_(), micro


def _by_definition(config, baseline):
    """Mean over the answers of lambda_y - v(x, y), and its derivative by each answer's log-prob."""
    losses, slopes = [], []
    for logp, logp_ref, is_desirable in zip(POLICY, REFERENCE, IS_DESIRABLE, strict=True):
        weight = config.desirable_weight if is_desirable else config.undesirable_weight
        sign = 1 if is_desirable else -1
        sigmoid = 1 / (1 + math.exp(-config.beta * sign * ((logp - logp_ref) - baseline)))
        losses.append(weight - weight * sigmoid)
        slopes.append(-weight * sign * config.beta * sigmoid * (1 - sigmoid) / 5)
    return sum(losses) / 5, slopes


def _first_positions(micro):
    return [start + PROMPT_LENGTH - 1 for start in micro.batch.cu_seqlens[:5]]


@LAYOUTS
@CONFIGS
@pytest.mark.parametrize("baseline", [0.0, 0.65])
def test_loss_and_gradient_equal_the_definition(packed, config, baseline):
    logp_T, micro = _micro(packed, baseline)
    output = KTO(config).loss(logp_T, micro)
    output.loss.backward()
    loss, slopes = _by_definition(config, baseline)
    close(output.loss, loss)
    close(logp_T.grad[_first_positions(micro)], slopes)
    assert (logp_T.grad != 0).sum() == sum(LENGTHS)


@CONFIGS
def test_loss_gradient_baseline_and_metrics_equal_trl(config):
    logp_S = grid(POLICY).requires_grad_()
    unrelated, unrelated_ref = map(grid, UNRELATED)
    weights = (config.desirable_weight, config.undesirable_weight)
    trl_loss, trl_metrics = trl_kto(
        logp_S, grid(REFERENCE), unrelated, unrelated_ref, torch.tensor(IS_DESIRABLE), config.beta, weights
    )
    trl_loss.backward()
    baseline = kl_baseline((unrelated - unrelated_ref).sum().item(), 5)
    assert baseline == pytest.approx(trl_metrics["kl"])
    logp_T, micro = _micro(baseline=baseline)
    output = KTO(config).loss(logp_T, micro)
    output.loss.backward()
    close(output.loss, trl_loss.item())
    close(logp_T.grad[_first_positions(micro)], logp_S.grad.tolist())
    for name, (total, count) in output.metrics.items():
        if name != "loss":
            assert total / count == pytest.approx(trl_metrics[name]), name
    print(f"loss differs from TRL's by {abs(output.loss - trl_loss).item():.1e}")


def test_metrics_count_the_answers_of_each_verdict():
    metrics = KTO(Config()).loss(*_micro()).metrics
    assert metrics["rewards/chosen"] == pytest.approx((0.1 * (0.5 - 1.0 + 0.25), 3))
    assert metrics["rewards/rejected"] == pytest.approx((0.1 * (-0.25 + 3.5), 2))
    assert metrics["logps/chosen"] == pytest.approx((-9.5 - 4.0 - 7.5, 3))
    assert metrics["logps/rejected"] == pytest.approx((-2.25 - 20.0, 2))
    assert metrics["kl"] == pytest.approx((5 * 0.65, 5))
    assert metrics["loss"] == pytest.approx((_by_definition(Config(), 0.65)[0], 1))


def test_no_gradient_flows_into_the_baseline():
    logp_T, micro = _micro()
    baseline = grid(0.65).requires_grad_()
    KTO(Config()).loss(logp_T, replace(micro, baseline=baseline)).loss.backward()
    assert baseline.grad is None


@LAYOUTS
def test_padding_does_not_change_loss_or_gradient(packed):
    outcomes = []
    for padding in (0.0, GARBAGE, -1e300):
        logp_T, micro = _micro(packed, padding=padding)
        output = KTO(Config()).loss(logp_T, micro)
        output.loss.backward()
        outcomes.append((output.loss.item(), logp_T.grad.tolist(), output.metrics))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_answer_of_weight_zero_counts_nowhere():
    logp_T, micro = _micro()
    full = KTO(Config()).loss(logp_T, micro)
    weight_S = grid([0.2, 0.2, 0.2, 0.2, 0.0])
    output = KTO(Config()).loss(logp_T, replace(micro, weight_S=weight_S))
    last = 0.2 / (1 + math.exp(0.1 * (0.25 - 0.65)))
    close(output.loss, full.loss.item() - last)
    assert output.metrics["rewards/chosen"] == pytest.approx((0.1 * (0.5 - 1.0), 2))
    assert output.metrics["kl"] == pytest.approx((4 * 0.65, 4))


def test_micro_batches_add_up_to_the_batch():
    logp_T, micro = _micro()
    whole = KTO(Config()).loss(logp_T, micro)
    parts = [
        KTO(Config()).loss(logp_T, replace(micro, weight_S=weight_S))
        for weight_S in (grid([0.2, 0.2, 0.0, 0.0, 0.0]), grid([0.0, 0.0, 0.2, 0.2, 0.2]))
    ]
    close(parts[0].loss + parts[1].loss, whole.loss.item())
    for name, total_and_count in whole.metrics.items():
        summed = [sum(column) for column in zip(*(part.metrics[name] for part in parts), strict=True)]
        assert summed == pytest.approx(total_and_count), name


@pytest.mark.parametrize(
    ("total", "count", "expected"), [(3.0, 4, 0.75), (-3.0, 4, 0.0), (0.0, 0, 0.0), (2.0, 1, 2.0)]
)
def test_baseline_is_a_mean_of_at_least_zero(total, count, expected):
    assert kl_baseline(total, count) == expected


def test_extreme_log_ratios_stay_finite():
    logp_T, micro = _micro()
    extreme = replace(micro, logp_ref_S=grid([1e6, -1e6, 1e6, -1e6, 0.0]))
    output = KTO(Config()).loss(logp_T, extreme)
    output.loss.backward()
    assert output.loss.isfinite()
    assert logp_T.grad.isfinite().all()


@pytest.mark.parametrize("key", ["beta", "desirable_weight", "undesirable_weight"])
def test_weights_must_be_positive(key):
    with pytest.raises(ValidationError, match="greater than 0"):
        Config(**{key: 0})
