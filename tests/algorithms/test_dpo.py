"""DPO loss against golden numbers, from summed log-probs and from logits."""

from dataclasses import replace

import pytest
import torch
from algorithms.grids import GARBAGE, GOLDEN, close, grid, ragged_batch, to_positions

from rto_megatron.algorithms.dpo import DPO, Config
from rto_megatron.types import PairMicrobatch

INPUTS = GOLDEN["pairwise_inputs"]
PROMPT_LENGTH = 2
LAYOUTS = pytest.mark.parametrize("packed", [True, False])


def _micro(packed, padding=GARBAGE):
    """Each golden sum spread evenly over the response tokens of its sequence."""
    lengths = INPUTS["chosen_len"] + INPUTS["rejected_len"]
    batch = ragged_batch(tuple(PROMPT_LENGTH + length for length in lengths), packed)
    logp_S = grid(INPUTS["policy_chosen_logps"] + INPUTS["policy_rejected_logps"])
    token_logp_S1 = (logp_S / grid(lengths)).unsqueeze(1)
    logp_T = to_positions(token_logp_S1.expand(-1, max(lengths)), batch, PROMPT_LENGTH, padding)
    mask_T = to_positions(torch.ones(6, max(lengths), dtype=torch.float64), batch, PROMPT_LENGTH, 0.0)
    logp_ref_S = grid(INPUTS["reference_chosen_logps"] + INPUTS["reference_rejected_logps"])
    micro = PairMicrobatch(batch, mask_T, grid([1 / 3] * 3), grid([0.0] * 3), logp_ref_S)
    return logp_T.requires_grad_(), micro


@LAYOUTS
@pytest.mark.parametrize(("smoothing", "key"), [(0.0, "dpo_beta0.1"), (0.1, "cdpo_beta0.1_ls0.1")])
def test_loss_and_gradient_equal_golden(packed, smoothing, key):
    logp_T, micro = _micro(packed)
    output = DPO(Config(label_smoothing=smoothing)).loss(logp_T, micro)
    output.loss.backward()
    close(output.loss, GOLDEN[key]["loss_mean"])
    grads = GOLDEN[key]["grad_policy_chosen_logps"] + GOLDEN[key]["grad_policy_rejected_logps"]
    num_tokens = sum(INPUTS["chosen_len"] + INPUTS["rejected_len"])
    first = [start + PROMPT_LENGTH - 1 for start in micro.batch.cu_seqlens[:6]]
    close(logp_T.grad[first], grads)
    assert (logp_T.grad != 0).sum() == num_tokens


def test_metrics_are_sums_over_pairs():
    golden, metrics = GOLDEN["dpo_beta0.1"], DPO(Config()).loss(*_micro(True)).metrics
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
def test_padding_does_not_change_loss_or_gradient(packed):
    outcomes = []
    for padding in (0.0, GARBAGE, -1e300):
        logp_T, micro = _micro(packed, padding)
        output = DPO(Config()).loss(logp_T, micro)
        output.loss.backward()
        outcomes.append((output.loss.item(), logp_T.grad.tolist(), output.metrics))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_pair_of_weight_zero_counts_nowhere():
    logp_T, micro = _micro(True)
    output = DPO(Config()).loss(logp_T, replace(micro, weight_P=grid([1 / 3, 1 / 3, 0.0])))
    close(output.loss, sum(GOLDEN["dpo_beta0.1"]["losses"][:2]) / 3)
    assert output.metrics["rewards/accuracies"] == (1, 2)


def test_policy_equal_to_reference_has_loss_log_two():
    logp_T, micro = _micro(True)
    logp_S = grid(INPUTS["policy_chosen_logps"] + INPUTS["policy_rejected_logps"])
    close(DPO(Config()).loss(logp_T, replace(micro, logp_ref_S=logp_S)).loss, 0.6931471805599453)
