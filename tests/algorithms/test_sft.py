"""Supervised loss against golden cross-entropy."""

import torch
from algorithms.grids import GARBAGE, GOLDEN, close, grid, ragged_batch

from rto_megatron.algorithms.sft import SFT, Config
from rto_megatron.types import SupervisedMicrobatch


def _micro() -> tuple[torch.Tensor, SupervisedMicrobatch]:
    """Rows of five tokens, padded to seven; positions of label -100 carry garbage instead of a log-prob."""
    logits_BRV = grid(GOLDEN["tdpo_inputs"]["policy_logits"])
    batch = ragged_batch((5, 5, 5, 5), packed=False)
    logp_T, weight_T = torch.full((28,), -GARBAGE, dtype=torch.float64), torch.zeros(28, dtype=torch.float64)
    for row, labels in enumerate(GOLDEN["tdpo_inputs"]["labels"]):
        for t, label in enumerate(labels[1:]):
            if label != -100:
                logp_T[row * 7 + t] = logits_BRV[row, t].log_softmax(-1)[label]
                weight_T[row * 7 + t] = 1 / GOLDEN["sft_ce_token_mean"]["n_tokens"]
    return logp_T.requires_grad_(), SupervisedMicrobatch(batch, weight_T)


def test_loss_equals_golden_cross_entropy():
    logp_T, micro = _micro()
    output = SFT(Config()).loss(logp_T, micro)
    close(output.loss, GOLDEN["sft_ce_token_mean"]["loss"])
    loss, count = output.metrics["loss"]
    close(grid(loss / count), GOLDEN["sft_ce_token_mean"]["loss"])


def test_gradient_is_minus_the_weight():
    logp_T, micro = _micro()
    SFT(Config()).loss(logp_T, micro).loss.backward()
    assert torch.equal(logp_T.grad, -micro.weight_T)
