"""DPO, cDPO and IPO against golden numbers, from summed log-probs and from logits, and against TRL 1.16.

TRL's `DPOTrainer._compute_loss` can be called for DPO and IPO; its IPO takes the mean over tokens, so the answers
have one token there. `CPOTrainer.cpo_loss`, given log-ratios, is cDPO and IPO on sums.
"""

from dataclasses import replace

import pytest
import torch
from algorithms.grids import GARBAGE, GOLDEN, close, grid, ragged_batch
from algorithms.pairs import INPUTS, LENGTHS, first_positions, golden_pairs, spread
from algorithms.trl_losses import trl_cpo, trl_dpo
from pydantic import ValidationError

from rto_megatron.algorithms.dpo import DPO, Config
from rto_megatron.types import PairMicrobatch

LAYOUTS = pytest.mark.parametrize("packed", [True, False])
POLICY = INPUTS["policy_chosen_logps"] + INPUTS["policy_rejected_logps"]
REFERENCE = INPUTS["reference_chosen_logps"] + INPUTS["reference_rejected_logps"]


@LAYOUTS
@pytest.mark.parametrize(
    ("config", "key"),
    [
        (Config(), "dpo_beta0.1"),
        (Config(label_smoothing=0.1), "cdpo_beta0.1_ls0.1"),
        (Config(loss="ipo"), "ipo_beta0.1"),
        (Config(loss="ipo", beta=0.01), "ipo_beta0.01"),
    ],
    ids=["dpo", "cdpo", "ipo", "ipo_beta0.01"],
)
def test_loss_and_gradient_equal_golden(packed, config, key):
    logp_T, micro = golden_pairs(packed)
    output = DPO(config).loss(logp_T, micro)
    output.loss.backward()
    golden = GOLDEN[key]
    close(output.loss, golden["loss_mean"])
    close(
        logp_T.grad[first_positions(micro)],
        golden["grad_policy_chosen_logps"] + golden["grad_policy_rejected_logps"],
    )
    assert (logp_T.grad != 0).sum() == sum(LENGTHS)
    assert output.metrics["rewards/chosen"] == pytest.approx((sum(golden["chosen_rewards"]), 3))
    assert output.metrics["rewards/rejected"] == pytest.approx((sum(golden["rejected_rewards"]), 3))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_gradient_and_metrics_equal_trl(loss, beta):
    logp_S = grid(POLICY).requires_grad_()
    trl_loss, trl_metrics = trl_dpo(logp_S, grid(REFERENCE), loss, beta)
    trl_loss.backward()
    logp_T, micro = spread(grid(POLICY), [1] * 6, packed=True)
    micro = replace(micro, logp_ref_S=grid(REFERENCE))
    output = DPO(Config(loss=loss, beta=beta)).loss(logp_T, micro)
    output.loss.backward()
    close(output.loss, trl_loss.item())
    close(logp_T.grad[first_positions(micro)], logp_S.grad.tolist())
    for name, (total, count) in output.metrics.items():
        if name not in ("loss", "rewards/ties"):  # TRL does not count ties
            assert total / count == pytest.approx(trl_metrics[name], rel=1e-6), name
    print(f"{loss}: loss differs from TRL's by {abs(output.loss - trl_loss).item():.1e}")


@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.1), ("sigmoid", 0.3), ("ipo", 0.0)])
def test_smoothed_and_summed_losses_equal_trl(loss, smoothing):
    losses_P, chosen_P, rejected_P = trl_cpo(grid(POLICY) - grid(REFERENCE), loss, 0.1, smoothing)
    output = DPO(Config(loss=loss, label_smoothing=smoothing)).loss(*golden_pairs(True))
    close(output.loss, losses_P.mean().item())
    assert output.metrics["rewards/chosen"] == pytest.approx((chosen_P.sum().item(), 3))
    assert output.metrics["rewards/rejected"] == pytest.approx((rejected_P.sum().item(), 3))


def test_metrics_are_sums_over_pairs():
    golden, metrics = GOLDEN["dpo_beta0.1"], DPO(Config()).loss(*golden_pairs(True)).metrics
    chosen, rejected = golden["chosen_rewards"], golden["rejected_rewards"]
    assert metrics["rewards/chosen"] == pytest.approx((sum(chosen), 3))
    assert metrics["rewards/rejected"] == pytest.approx((sum(rejected), 3))
    assert metrics["rewards/margins"] == pytest.approx((sum(chosen) - sum(rejected), 3))
    assert metrics["rewards/accuracies"] == (2, 3)
    assert metrics["logps/chosen"] == pytest.approx((sum(INPUTS["policy_chosen_logps"]), 3))
    assert metrics["logps/rejected"] == pytest.approx((sum(INPUTS["policy_rejected_logps"]), 3))
    assert metrics["loss"] == pytest.approx((golden["loss_mean"], 1), rel=1e-9)


@LAYOUTS
def test_loss_from_logits_equals_golden(packed):
    # Every row has five tokens; the golden labels say which of the four targets are response tokens.
    batch = ragged_batch((5, 5, 5, 5), packed)
    logits_BRV, labels = grid(GOLDEN["tdpo_inputs"]["policy_logits"]), GOLDEN["tdpo_inputs"]["labels"]
    logp_T = torch.full((batch.cu_seqlens[-1],), -GARBAGE, dtype=torch.float64)
    mask_T = torch.zeros_like(logp_T)
    for row, start in enumerate(batch.cu_seqlens[:4]):
        for t, label in enumerate(labels[row][1:]):
            if label != -100:
                logp_T[start + t] = logits_BRV[row, t].log_softmax(-1)[label]
                mask_T[start + t] = 1
    logp_ref_S = grid(GOLDEN["tdpo_intermediate"]["reference_logps"])
    micro = PairMicrobatch(batch, mask_T, grid([0.5, 0.5]), grid([0.0, 0.0]), logp_ref_S)
    output = DPO(Config()).loss(logp_T, micro)
    close(output.loss, GOLDEN["dpo_from_logits_beta0.1"]["loss_mean"])
    policy_logps = GOLDEN["tdpo_intermediate"]["policy_logps"]
    assert output.metrics["logps/chosen"] == pytest.approx((sum(policy_logps[:2]), 2), rel=1e-9)


@LAYOUTS
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_padding_does_not_change_loss_or_gradient(packed, loss):
    outcomes = []
    for padding in (0.0, GARBAGE, -1e300):
        logp_T, micro = golden_pairs(packed, padding)
        output = DPO(Config(loss=loss)).loss(logp_T, micro)
        output.loss.backward()
        outcomes.append((output.loss.item(), logp_T.grad.tolist(), output.metrics))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize(("loss", "key"), [("sigmoid", "dpo_beta0.1"), ("ipo", "ipo_beta0.1")])
def test_pair_of_weight_zero_counts_nowhere(loss, key):
    logp_T, micro = golden_pairs(True)
    output = DPO(Config(loss=loss)).loss(logp_T, replace(micro, weight_P=grid([1 / 3, 1 / 3, 0.0])))
    close(output.loss, sum(GOLDEN[key]["losses"][:2]) / 3)
    assert output.metrics["rewards/accuracies"] == (1, 2)
    assert output.metrics["rewards/ties"] == (0, 2)


@pytest.mark.parametrize(("loss", "expected"), [("sigmoid", 0.6931471805599453), ("ipo", 25.0)])
def test_policy_equal_to_reference_starts_where_the_paper_says(loss, expected):
    logp_T, micro = golden_pairs(True)
    close(DPO(Config(loss=loss)).loss(logp_T, replace(micro, logp_ref_S=grid(POLICY))).loss, expected)


def test_smoothing_with_ipo_is_refused():
    with pytest.raises(
        ValidationError, match=r"label_smoothing=0\.1 has no effect with loss='ipo'; remove it"
    ):
        Config(loss="ipo", label_smoothing=0.1)


def test_before_the_first_update_every_pair_is_a_tie_and_none_is_won():
    logp_T, micro = spread(grid(POLICY), [1] * 6, packed=True)
    at_start = DPO(Config()).loss(logp_T, replace(micro, logp_ref_S=grid(POLICY))).metrics
    assert (at_start["rewards/ties"], at_start["rewards/accuracies"]) == ((3, 3), (0, 3))
    later = DPO(Config()).loss(logp_T, replace(micro, logp_ref_S=grid(REFERENCE))).metrics
    assert later["rewards/ties"] == (0, 3)
