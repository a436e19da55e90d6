"""Importance sampling on the gap to the pool, in the loss of every method that samples."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from algorithms.grids import close, no_reduction
from algorithms.ragged import DELIMITER, LONGEST, scored_rollouts, step_minibatches

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.algorithms.pool_importance import ImportanceMode, pool_importance

CAP = 1.5
MODES = get_args(ImportanceMode)
COUNT = 8
ONLINE = [name for name, method in ALGORITHMS.items() if isinstance(method, OnlineMethod)]
EVERY_METHOD = pytest.mark.parametrize("name", ONLINE)


def build(name, cap, mode="token_truncate"):
    method = ALGORITHMS[name]
    group = {} if method.config().samples_per_prompt == 1 else {"samples_per_prompt": COUNT // 2}
    config = method.config(pool_importance_cap=cap, pool_importance_mode=mode, **group)
    return method.build(config, lambda _: frozenset({DELIMITER}))


def slow_term(algorithm, name, ratios, t, logp, advantage):
    """What a method minimises at a token, before the importance, from the log-ratios of its response."""
    config, ratio = algorithm.config, torch.exp(ratios[t])
    if name == "rloo":
        return -advantage * logp
    if name == "cispo":
        return -ratio.clamp(max=1 + config.clip_eps_high).detach() * advantage * logp
    if name == "gspo":
        of_response = torch.exp(sum(ratios) / len(ratios)).detach()
        ratio = of_response * torch.exp(ratios[t] - ratios[t].detach())
    high = config.clip_eps if config.clip_eps_high is None else config.clip_eps_high
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - config.clip_eps, 1 + high) * advantage)


def slow_weights(algorithm, lengths):
    """What a token of each response weighs in the loss."""
    shares = {
        "sequence_mean": [1 / length / len(lengths) for length in lengths],
        "token_mean": [1 / sum(lengths)] * len(lengths),
        "constant": [1 / LONGEST / len(lengths)] * len(lengths),
    }
    return shares[algorithm.config.loss_weights]


def agreeing(scored):
    """The same rollouts from a pool that computes what the trainer does."""
    return replace(scored, logp_pool_BR=scored.logp_old_BR)


def gapped(gaps):
    """One response whose log-probs under the trainer are these nats above the pool's."""
    gap_1R = torch.tensor([gaps])
    ones_1R, zeros_1R = torch.ones_like(gap_1R), torch.zeros_like(gap_1R)
    return replace(
        scored_rollouts(1), mask_BR=ones_1R, sampled_BR=ones_1R, logp_old_BR=zeros_1R, logp_pool_BR=-gap_1R
    )


def moved(minibatch):
    """Log-probs of a policy that has moved far enough for some ratios to be clipped."""
    noise_T = torch.randn(len(minibatch.logp_old_T), generator=torch.Generator().manual_seed(5))
    return (minibatch.logp_old_T + 0.3 * noise_T.to(minibatch.logp_old_T)).requires_grad_()


def step(algorithm, scored):
    """Loss, its gradient, sums for the logs and the micro-batch of one optimizer step on everything."""
    experience = algorithm.credit(scored, 0.01, no_reduction)
    weighting = algorithm.config.loss_weights
    (minibatch,) = step_minibatches(experience, weighting, range(COUNT), COUNT, packed=True)
    logp_T = moved(minibatch)
    output = algorithm.policy_loss(logp_T, minibatch)
    (grad_T,) = torch.autograd.grad(output.loss, logp_T)
    return output.loss, grad_T, algorithm.credit_metrics(scored, experience), minibatch


def slow_importance(scored, cap, mode="token_truncate"):
    """TRL's weights token by token, in Python floats; a token that the pool did not sample has the ratio 1."""
    rows = []
    for row, rollout in enumerate(scored.rollouts):
        gaps = [
            float(scored.logp_old_BR[row, t]) - float(scored.logp_pool_BR[row, t])
            if scored.sampled_BR[row, t]
            else 0.0
            for t in range(len(rollout.response_ids))
        ]
        if mode.startswith("sequence"):
            gaps = [math.fsum(gaps)] * len(gaps)
        kept = 0.0 if mode.endswith("mask") else cap
        rows.append([math.exp(gap) if math.exp(gap) <= cap else kept for gap in gaps])
    return rows


def near(scored, shrink):
    """The same rollouts with a gap so much smaller: the product over a response stays near 1."""
    gap_BR = scored.logp_old_BR - scored.logp_pool_BR
    return replace(scored, logp_pool_BR=scored.logp_old_BR - shrink * gap_BR)


@pytest.mark.parametrize("mode", MODES)
@EVERY_METHOD
def test_loss_and_gradient_equal_a_slow_loop(name, mode):
    scored = near(scored_rollouts(COUNT, seed=2, cut=(1, 5)), 0.3)
    loss, grad_T, _, minibatch = step(build(name, CAP, mode), scored)
    experience = build(name, None).credit(scored, 0.01, no_reduction)
    logp_T = moved(minibatch)
    algorithm = build(name, CAP)
    beta_kl = algorithm.config.beta_kl if name == "grpo" else 0.0
    shares = slow_weights(algorithm, [len(rollout.response_ids) for rollout in scored.rollouts])
    expected = torch.zeros((), dtype=torch.float64)
    slow = slow_importance(scored, CAP, mode)
    assert len({weight for weights in slow for weight in weights}) > 2
    assert any(weight == (0.0 if mode.endswith("mask") else CAP) for weights in slow for weight in weights)
    for row, weights in enumerate(slow):
        first = minibatch.batch.cu_seqlens[row] + len(scored.rollouts[row].prompt_ids) - 1
        ratios = [logp_T[first + t] - scored.logp_old_BR[row, t] for t in range(len(weights))]
        for t, weight in enumerate(weights):
            logp, advantage = logp_T[first + t], experience.advantages_BR[row, t]
            term = slow_term(algorithm, name, ratios, t, logp, advantage)
            back = scored.logp_ref_BR[row, t] - logp
            k3 = torch.exp(back) - back - 1
            expected = expected + shares[row] * (beta_kl * k3 + weight * term)
    (expected_T,) = torch.autograd.grad(expected, logp_T)
    close(loss, expected.item())
    close(grad_T, expected_T.tolist())
    print(f"{name}: loss differs by {abs(loss.item() - expected.item()):.1e}")


@EVERY_METHOD
def test_without_a_cap_no_bit_depends_on_the_pool(name):
    scored = scored_rollouts(COUNT, cut=(1, 5))
    one_loss, one_grad_T, metrics, minibatch = step(build(name, None), scored)
    other_loss, other_grad_T, _, _ = step(build(name, None), agreeing(scored))
    assert torch.equal(one_loss, other_loss) and torch.equal(one_grad_T, other_grad_T)
    assert torch.equal(minibatch.pool_importance_T[minibatch.weight_T > 0].unique(), torch.ones(1).double())
    assert not any(metric.startswith("pool/") for metric in metrics)


@EVERY_METHOD
def test_where_pool_and_trainer_agree_the_cap_changes_no_bit(name):
    for dtype in (torch.float64, torch.float32):
        drawn = agreeing(scored_rollouts(COUNT, cut=(1, 5)))
        scored = replace(drawn, **{k: v.to(dtype) for k, v in vars(drawn).items() if torch.is_tensor(v)})
        off_loss, off_grad_T, _, _ = step(build(name, None), scored)
        for cap, mode in ((1.0, "token_truncate"), *((2.0, mode) for mode in MODES)):
            on_loss, on_grad_T, metrics, minibatch = step(build(name, cap, mode), scored)
            assert torch.equal(off_loss, on_loss) and torch.equal(off_grad_T, on_grad_T)
            assert bool((minibatch.pool_importance_T[minibatch.weight_T > 0] == 1).all())
            num_tokens = float(scored.mask_BR.sum())
            assert metrics["pool/importance_mean"] == (num_tokens, num_tokens)
            assert metrics["pool/importance_capped_fraction"] == (0.0, num_tokens)


@EVERY_METHOD
def test_a_gap_changes_the_loss_of_every_method(name):
    scored = scored_rollouts(COUNT, seed=3)
    off, on = step(build(name, None), scored), step(build(name, CAP), scored)
    assert abs(off[0] - on[0]) > 1e-3
    assert not torch.equal(off[1], on[1])


def test_a_planted_gap_is_cut_at_the_cap():
    weights_BR = pool_importance(gapped([0.0, math.log(1.2), 1.0, -2.0, 200.0]), CAP)
    torch.testing.assert_close(weights_BR, torch.tensor([[1.0, 1.2, CAP, math.exp(-2.0), CAP]]))
    assert weights_BR[0, [2, 4]].tolist() == [CAP, CAP]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_mask", [1.0, 1.2, 0.0, math.exp(-2.0), 0.0]),
        ("sequence_truncate", [CAP] * 5),
        ("sequence_mask", [0.0] * 5),
    ],
)
def test_a_planted_gap_is_cut_or_trains_nothing(mode, expected):
    gaps = [0.0, math.log(1.2), 1.0, -2.0, 200.0]  # nats; exp of their sum is no float32
    torch.testing.assert_close(pool_importance(gapped(gaps), CAP, mode), torch.tensor([expected]))
    below = pool_importance(gapped([0.1, -0.2, 0.3]), CAP, mode)
    ratios = [math.exp(0.2)] * 3 if mode.startswith("sequence") else [math.exp(x) for x in (0.1, -0.2, 0.3)]
    torch.testing.assert_close(below, torch.tensor([ratios]))


def test_a_mode_without_a_cap_is_refused():
    with pytest.raises(ValueError, match='pool_importance_mode="sequence_mask" has no effect without'):
        ALGORITHMS["rto"].config(pool_importance_mode="sequence_mask")


def test_tokens_that_the_truncation_policy_wrote_weigh_1():
    scored = gapped([1.0, -1.0, 1.0])
    written = replace(scored, sampled_BR=torch.tensor([[1.0, 1.0, 0.0]]))
    assert pool_importance(scored, CAP)[0, 2] == CAP
    assert pool_importance(written, CAP)[0, 2] == 1.0


def test_the_value_loss_knows_no_pool():
    scored = scored_rollouts(COUNT)
    losses = []
    for cap in (None, CAP):
        algorithm = build("ppo", cap)
        experience = algorithm.credit(scored, 0.01, no_reduction)
        (minibatch,) = step_minibatches(experience, "sequence_mean", range(COUNT), COUNT, packed=True)
        losses.append(algorithm.value_loss(minibatch.values_old_T + 0.1, minibatch).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("truncated", ["penalise", "mask"])
def test_metrics_are_over_the_trained_tokens(truncated):
    scored = scored_rollouts(COUNT, seed=4, cut=(1, 5))
    method = ALGORITHMS["ppo"]
    config = method.config(pool_importance_cap=CAP, truncated=truncated)
    algorithm = method.build(config, lambda _: frozenset())
    metrics = algorithm.credit_metrics(scored, algorithm.credit(scored, 0.01, no_reduction))
    rows = [row for row in range(COUNT) if truncated != "mask" or row not in (1, 5)]
    slow = slow_importance(scored, CAP)
    weights = [weight for row in rows for weight in slow[row]]
    num_capped = sum(weight == CAP for weight in weights)
    assert metrics["pool/importance_mean"] == pytest.approx((sum(weights), len(weights)), rel=1e-9)
    assert metrics["pool/importance_capped_fraction"] == (num_capped, len(weights))
    assert 0 < num_capped < len(weights)


@EVERY_METHOD
@pytest.mark.parametrize("cap", [0.999, 0.0, -1.0, math.inf, math.nan, "two"])
def test_a_cap_that_makes_no_sense_is_refused(name, cap):
    with pytest.raises(ValueError, match="pool_importance_cap"):
        ALGORITHMS[name].config(pool_importance_cap=cap)
    assert ALGORITHMS[name].config().pool_importance_cap is None
    assert ALGORITHMS[name].config(pool_importance_cap=1).pool_importance_cap == 1.0
