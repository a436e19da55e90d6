"""SimPO against golden numbers and against TRL 1.16's `CPOTrainer.cpo_loss`, which can be called for both losses."""

from dataclasses import replace

import pytest
from algorithms.grids import GARBAGE, GOLDEN, close, grid
from algorithms.pairs import INPUTS, LENGTHS, first_positions, golden_pairs
from algorithms.trl_losses import trl_cpo
from pydantic import ValidationError

from rto_megatron.algorithms.simpo import Config, SimPO

LAYOUTS = pytest.mark.parametrize("packed", [True, False])
SUMS = INPUTS["policy_chosen_logps"] + INPUTS["policy_rejected_logps"]


@LAYOUTS
@pytest.mark.parametrize(
    ("config", "key"),
    [(Config(), "simpo_beta2.5_gamma0.5"), (Config(beta=2.0, gamma=1.0), "simpo_beta2.0_gamma1.0")],
    ids=["rto_paper", "simpo_repo"],
)
def test_loss_gradient_and_rewards_equal_golden(packed, config, key):
    logp_T, micro = golden_pairs(packed)
    output = SimPO(config).loss(logp_T, micro)
    output.loss.backward()
    golden, metrics = GOLDEN[key], output.metrics
    close(output.loss, golden["loss_mean"])
    close(
        logp_T.grad[first_positions(micro)],
        golden["grad_sum_chosen_logps"] + golden["grad_sum_rejected_logps"],
    )
    assert (logp_T.grad != 0).sum() == sum(LENGTHS)
    chosen, rejected = golden["chosen_rewards"], golden["rejected_rewards"]
    assert metrics["rewards/chosen"] == pytest.approx((sum(chosen), 3))
    assert metrics["rewards/rejected"] == pytest.approx((sum(rejected), 3))
    assert metrics["rewards/margins"] == pytest.approx((sum(chosen) - sum(rejected), 3))
    assert metrics["rewards/accuracies"] == (1, 3)
    assert metrics["logps/chosen"] == pytest.approx((sum(INPUTS["policy_chosen_logps"]), 3))


@LAYOUTS
def test_hinge_equals_golden(packed):
    close(
        SimPO(Config(loss="hinge")).loss(*golden_pairs(packed)).loss,
        GOLDEN["simpo_hinge_beta2.5_gamma0.5"]["loss_mean"],
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("beta", "gamma"), [(2.5, 0.5), (2.0, 1.0), (10.0, 3.0)])
def test_loss_and_gradient_equal_trl(beta, gamma, smoothing):
    sums_S = grid(SUMS).requires_grad_()
    losses_P, chosen_P, rejected_P = trl_cpo(sums_S / grid(LENGTHS), "simpo", beta, smoothing, gamma)
    losses_P.mean().backward()
    logp_T, micro = golden_pairs(True)
    output = SimPO(Config(beta=beta, gamma=gamma, label_smoothing=smoothing)).loss(logp_T, micro)
    output.loss.backward()
    close(output.loss, losses_P.mean().item())
    close(logp_T.grad[first_positions(micro)], sums_S.grad.tolist())
    assert output.metrics["rewards/chosen"] == pytest.approx((chosen_P.sum().item(), 3))
    assert output.metrics["rewards/rejected"] == pytest.approx((rejected_P.sum().item(), 3))
    print(f"loss differs from TRL's by {abs(output.loss - losses_P.mean()).item():.1e}")


def test_hinge_without_margin_equals_trl():
    # TRL's hinge has no gamma.
    losses_P, _, _ = trl_cpo(grid(SUMS) / grid(LENGTHS), "hinge", beta=2.5)
    close(SimPO(Config(loss="hinge", gamma=0)).loss(*golden_pairs(True)).loss, losses_P.mean().item())


def test_reference_is_not_read():
    logp_T, micro = golden_pairs(True)
    other = replace(micro, logp_ref_S=micro.logp_ref_S * GARBAGE)
    assert SimPO(Config()).loss(logp_T, micro).metrics == SimPO(Config()).loss(logp_T, other).metrics


@LAYOUTS
@pytest.mark.parametrize("loss", ["sigmoid", "hinge"])
def test_padding_does_not_change_loss_or_gradient(packed, loss):
    outcomes = []
    for padding in (0.0, GARBAGE, -1e300):
        logp_T, micro = golden_pairs(packed, padding)
        output = SimPO(Config(loss=loss)).loss(logp_T, micro)
        output.loss.backward()
        outcomes.append((output.loss.item(), logp_T.grad.tolist(), output.metrics))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_pair_of_weight_zero_counts_nowhere():
    logp_T, micro = golden_pairs(True)
    output = SimPO(Config()).loss(logp_T, replace(micro, weight_P=grid([1 / 3, 1 / 3, 0.0])))
    output.loss.backward()
    close(output.loss, sum(GOLDEN["simpo_beta2.5_gamma0.5"]["losses"][:2]) / 3)
    assert output.metrics["rewards/accuracies"] == (1, 2)
    assert (logp_T.grad != 0).sum() == sum(LENGTHS) - LENGTHS[2] - LENGTHS[5]


def test_smoothing_with_hinge_is_refused():
    with pytest.raises(
        ValidationError, match=r"label_smoothing=0\.1 has no effect with loss='hinge'; remove it"
    ):
        Config(loss="hinge", label_smoothing=0.1)
