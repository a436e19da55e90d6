"""TDPO1 and TDPO2 against golden numbers and gradients; TRL 1.16 has neither."""

from dataclasses import replace

import pytest
import torch
from algorithms.grids import GARBAGE, GOLDEN, close, grid, ragged_batch
from pydantic import ValidationError

from rto_megatron.algorithms.tdpo import TDPO, Config
from rto_megatron.types import PairMicrobatch

INPUTS = GOLDEN["tdpo_inputs"]
LAYOUTS = pytest.mark.parametrize("packed", [True, False])
CASES = pytest.mark.parametrize(
    ("config", "key"),
    [
        (Config(variant=1), "tdpo1_beta0.1"),
        (Config(), "tdpo2_beta0.1_alpha0.2"),
        (Config(alpha=0.5), "tdpo2_beta0.1_alpha0.5"),
    ],
    ids=["tdpo1", "tdpo2", "tdpo2_alpha0.5"],
)


def _micro(packed, padding=GARBAGE):
    """What the model's side gives, from the golden logits; every row has five tokens, some are response tokens."""
    batch = ragged_batch((5, 5, 5, 5), packed)
    policy_BRV, reference_BRV = (
        grid(INPUTS[f"{name}_logits"]).log_softmax(-1) for name in ("policy", "reference")
    )
    outputs_3T = torch.full((3, batch.cu_seqlens[-1]), padding, dtype=torch.float64)
    mask_T = torch.zeros_like(outputs_3T[0])
    for row, start in enumerate(batch.cu_seqlens[:4]):
        for t, label in enumerate(INPUTS["labels"][row][1:]):
            if label != -100:
                policy_V, reference_V = policy_BRV[row, t], reference_BRV[row, t]
                kl = (reference_V.exp() * (reference_V - policy_V)).sum()
                outputs_3T[:, start + t] = torch.stack([policy_V[label], reference_V[label], kl])
                mask_T[start + t] = 1
    micro = PairMicrobatch(batch, mask_T, grid([0.5, 0.5]), grid([0.0, 0.0]), grid([GARBAGE] * 4))
    return outputs_3T.requires_grad_(), micro


def _per_sequence(grad_T, micro):
    """The gradient that every response token of a sequence shares, shape [S]."""
    shared = []
    for start in micro.batch.cu_seqlens[:4]:
        row = grad_T[start : start + 5][micro.mask_T[start : start + 5] != 0]
        assert torch.equal(row, row[:1].expand(len(row)))
        shared.append(row[0])
    return torch.stack(shared)


@LAYOUTS
@CASES
def test_loss_and_gradients_equal_golden(packed, config, key):
    outputs_3T, micro = _micro(packed)
    output = TDPO(config).loss(outputs_3T, micro)
    output.loss.backward()
    golden = GOLDEN[key]
    close(output.loss, golden["loss_mean"])
    logp_grad_S, kl_grad_S = (_per_sequence(outputs_3T.grad[row], micro) for row in (0, 2))
    close(logp_grad_S, golden["grad_chosen_logps_margin"] + golden["grad_rejected_logps_margin"])
    close(kl_grad_S, golden["grad_chosen_position_kl"] + golden["grad_rejected_position_kl"])
    assert not outputs_3T.grad[1].any()
    assert not outputs_3T.grad[:, micro.mask_T == 0].any()
    print(f"loss differs by {abs(output.loss.item() - golden['loss_mean']):.1e}")


@CASES
def test_only_the_first_variant_pushes_the_chosen_kl(config, key):
    outputs_3T, micro = _micro(True)
    TDPO(config).loss(outputs_3T, micro).loss.backward()
    kl_grad_S = _per_sequence(outputs_3T.grad[2], micro)
    assert kl_grad_S[:2].any() == (config.variant == 1)
    assert kl_grad_S[2:].all()


@CASES
def test_metrics_are_sums_over_pairs(config, key):
    golden, steps = GOLDEN[key], GOLDEN["tdpo_intermediate"]
    metrics = TDPO(config).loss(*_micro(True)).metrics
    chosen, rejected = golden["chosen_rewards"], golden["rejected_rewards"]
    assert metrics["rewards/chosen"] == pytest.approx((sum(chosen), 2), rel=1e-9)
    assert metrics["rewards/rejected"] == pytest.approx((sum(rejected), 2), rel=1e-9)
    assert metrics["rewards/margins"] == pytest.approx((sum(chosen) - sum(rejected), 2), rel=1e-9)
    assert metrics["rewards/accuracies"] == (2, 2)
    assert metrics["logps/chosen"] == pytest.approx((sum(steps["policy_logps"][:2]), 2), rel=1e-9)
    assert metrics["logps/rejected"] == pytest.approx((sum(steps["policy_logps"][2:]), 2), rel=1e-9)
    kl_S = steps["sequential_kl_ref_to_policy"]
    assert metrics["kl/chosen"] == pytest.approx((sum(kl_S[:2]), 2), rel=1e-9)
    assert metrics["kl/rejected"] == pytest.approx((sum(kl_S[2:]), 2), rel=1e-9)
    assert metrics["loss"] == pytest.approx((golden["loss_mean"], 1), rel=1e-9)


@LAYOUTS
@CASES
def test_padding_does_not_change_loss_or_gradient(packed, config, key):
    outcomes = []
    for padding in (0.0, GARBAGE, -1e300):
        outputs_3T, micro = _micro(packed, padding)
        output = TDPO(config).loss(outputs_3T, micro)
        output.loss.backward()
        outcomes.append((output.loss.item(), outputs_3T.grad.tolist(), output.metrics))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@CASES
def test_pair_of_weight_zero_counts_nowhere(config, key):
    outputs_3T, micro = _micro(True)
    output = TDPO(config).loss(outputs_3T, replace(micro, weight_P=grid([0.5, 0.0])))
    close(output.loss, GOLDEN[key]["losses"][0] / 2)
    kl_S = GOLDEN["tdpo_intermediate"]["sequential_kl_ref_to_policy"]
    assert output.metrics["kl/rejected"] == pytest.approx((kl_S[2], 1))


def test_first_variant_refuses_an_alpha():
    with pytest.raises(ValidationError, match=r"alpha=0\.5 has no effect with variant 1; remove it"):
        Config(variant=1, alpha=0.5)
    assert Config.model_validate(Config(variant=1).model_dump()).variant == 1
