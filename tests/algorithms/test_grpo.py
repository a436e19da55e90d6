"""GRPO against slow loops of its definition, autograd and TRL."""

import math
from dataclasses import replace

import pytest
import torch
from algorithms.grids import close, grid, no_reduction
from algorithms.ragged import scored_rollouts, step_minibatches
from algorithms.trl_losses import trl_grpo

from rto_megatron.algorithms import groups, grpo, losses

GROUP = 4
COUNT = 12


def _build(**keys):
    return grpo.build(grpo.Config(**{"samples_per_prompt": GROUP, **keys}), lambda _: frozenset())


def _slow_advantages(scores):
    """(score - mean) / (unbiased deviation + 1e-4) within each group of neighbours."""
    relative = []
    for start in range(0, len(scores), GROUP):
        group = scores[start : start + GROUP]
        mean = sum(group) / GROUP
        std = math.sqrt(sum((x - mean) ** 2 for x in group) / (GROUP - 1))
        relative += [(x - mean) / (std + 1e-4) for x in group]
    return relative


def test_every_token_gets_the_score_of_its_response_relative_to_its_group():
    scored = scored_rollouts(COUNT, seed=1, cut=(3, 7))
    scored = replace(scored, score_B=scored.score_B * 6)  # some are clamped
    experience = _build().credit(scored, 0.04, no_reduction)
    scores = [
        min(max(float(score), -10.0), 10.0) - (1.0 if rollout.finish_reason == "length" else 0.0)
        for score, rollout in zip(scored.score_B, scored.rollouts, strict=True)
    ]
    assert max(map(abs, scores)) >= 10
    for row, relative in enumerate(_slow_advantages(scores)):
        length = len(scored.rollouts[row].response_ids)
        close(experience.advantages_BR[row, :length], [relative] * length)
        close(experience.returns_BR[row, :length], [scores[row]] * length)
        assert not experience.advantages_BR[row, length:].any()


def test_neither_the_kl_nor_the_dpo_model_is_part_of_the_reward():
    scored = scored_rollouts(COUNT)
    rewards = _build().credit(scored, 0.5, no_reduction).rewards
    close(rewards.total_BR().sum(1), scored.score_B.tolist())
    assert not rewards.kl_BR.any() and not rewards.dpo_BR.any()


def test_a_group_of_equal_scores_teaches_nothing():
    scored = scored_rollouts(COUNT)
    scored = replace(scored, score_B=grid([1.5] * GROUP + [0.25, 0.5, 0.75, 1.0] + [-2.0] * GROUP))
    advantages_BR = _build().credit(scored, 0.04, no_reduction).advantages_BR
    assert not advantages_BR[:GROUP].any() and not advantages_BR[-GROUP:].any()
    assert advantages_BR[GROUP:-GROUP, 0].all()


def test_groups_are_neighbours_of_one_prompt():
    scores = grid([1.0, 2.0, 3.0, 10.0, 20.0, 30.0])
    relative_B = (scores - groups.mean_of_group(scores, 3)) / groups.deviation_of_group(scores, 3)
    close(relative_B, [-1 / 1.0001, 0.0, 1 / 1.0001, -10 / 10.0001, 0.0, 10 / 10.0001])


def _moved(experience, seed=5):
    """Log-probs of a policy that has moved far enough for some ratios to be clipped."""
    noise_BR = torch.randn(experience.mask_BR.shape, generator=torch.Generator().manual_seed(seed)).double()
    return losses.keep(experience.logp_old_BR + 0.3 * noise_BR, experience.mask_BR).requires_grad_()


def _positions(logp_BR, experience, minibatch):
    """`logp_BR` at the positions that predict the tokens, [T]; differentiable."""
    logp_T = torch.zeros_like(minibatch.weight_T)
    starts = minibatch.batch.cu_seqlens
    for row, rollout in enumerate(experience.rollouts):
        first = starts[row] + len(rollout.prompt_ids) - 1
        places = torch.arange(first, first + len(rollout.response_ids))
        logp_T = logp_T.index_put((places,), logp_BR[row, : len(places)])
    return logp_T


def _loss(beta_kl, experience, logp_BR, packed=True):
    (minibatch,) = step_minibatches(experience, "sequence_mean", range(COUNT), COUNT, packed)
    output = _build(beta_kl=beta_kl).policy_loss(_positions(logp_BR, experience, minibatch), minibatch)
    (grad_BR,) = torch.autograd.grad(output.loss, logp_BR)
    return output, grad_BR


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("beta_kl", [0.04, 0.5, 0.0])
def test_loss_and_gradient_equal_a_slow_loop(beta_kl, packed):
    experience = _build().credit(scored_rollouts(COUNT, seed=2), 0.04, no_reduction)
    logp_BR = _moved(experience)
    output, grad_BR = _loss(beta_kl, experience, logp_BR, packed)

    total, num_clipped = grid(0.0), 0
    for row, rollout in enumerate(experience.rollouts):
        length = len(rollout.response_ids)
        mean = grid(0.0)
        for t in range(length):
            advantage = experience.advantages_BR[row, t]
            ratio = torch.exp(logp_BR[row, t] - experience.logp_old_BR[row, t])
            clipped = ratio.clamp(0.8, 1.2)
            num_clipped += bool(clipped * advantage < ratio * advantage)
            back = experience.logp_ref_BR[row, t] - logp_BR[row, t]
            k3 = torch.exp(back) - back - 1
            mean = mean - (torch.minimum(ratio * advantage, clipped * advantage) - beta_kl * k3) / length
        total = total + mean / COUNT
    (expected_BR,) = torch.autograd.grad(total, logp_BR)
    close(output.loss, total.item())
    close(grad_BR, expected_BR.tolist())
    assert output.metrics["policy/clipfrac_avg"][0] == num_clipped > 0
    print(f"loss differs by {abs(output.loss.item() - total.item()):.1e}")


def test_loss_gradient_and_kl_equal_trl():
    scored = scored_rollouts(COUNT, seed=4)
    experience = _build().credit(scored, 0.04, no_reduction)
    logp_BR = _moved(experience)
    output, grad_BR = _loss(0.04, experience, logp_BR)
    old_BR, ref_BR = (
        losses.keep(x, experience.mask_BR) for x in (experience.logp_old_BR, experience.logp_ref_BR)
    )
    advantages_B = experience.advantages_BR[:, 0]
    loss, metrics = trl_grpo(logp_BR, old_BR, ref_BR, advantages_B, experience.mask_BR, 0.04, 0.2)
    (expected_BR,) = torch.autograd.grad(loss, logp_BR)
    close(output.loss, loss.item())
    close(grad_BR, expected_BR.tolist())
    total, count = output.metrics["policy/clipfrac_avg"]
    assert total / count == pytest.approx(metrics["clip_ratio/region_mean"], rel=1e-6) and total
    print(f"loss differs from TRL's by {abs(output.loss.item() - loss.item()):.1e}")


def test_logged_kl_is_the_term_of_the_loss():
    experience = _build().credit(scored_rollouts(COUNT, seed=4), 0.04, no_reduction)
    logp_BR = _moved(experience)
    output, _ = _loss(0.5, experience, logp_BR)
    plain, _ = _loss(0.0, experience, logp_BR)
    kl, count = output.metrics["loss/kl_avg"]
    assert count == pytest.approx(1)
    close(output.loss - plain.loss, 0.5 * kl)


def test_tokens_without_weight_feel_no_kl():
    experience = _build(truncated="mask").credit(
        scored_rollouts(COUNT, seed=4, cut=(0, 5)), 0.04, no_reduction
    )
    (minibatch,) = step_minibatches(experience, "sequence_mean", range(COUNT), COUNT, True)
    logp_T = (minibatch.logp_ref_T + 1).requires_grad_()
    _build().policy_loss(logp_T, minibatch).loss.backward()
    starts = minibatch.batch.cu_seqlens
    for row in range(COUNT):
        assert bool(logp_T.grad[starts[row] : starts[row + 1]].any()) == (row not in (0, 5))


def test_defaults_are_those_of_the_paper():
    config = grpo.Config()
    assert (config.beta_kl, config.clip_eps, config.loss_weights) == (0.04, 0.2, "sequence_mean")
    assert (config.samples_per_prompt, config.epochs) == (8, 1)
    assert "gamma" not in config.model_dump() and "kl_target" not in config.model_dump()
    algorithm = _build()
    assert algorithm.value_loss is None
    assert algorithm.kl_controller.update(99.0, 1000) == algorithm.kl_controller
