"""REINFORCE++, and RTO on it, against slow loops of their definitions."""

import math

import pytest
import torch
from algorithms.grids import close, no_reduction
from algorithms.ragged import scored_rollouts, step_minibatches

from rto_megatron.algorithms import ALGORITHMS, policy_losses

NAMES = ("reinforce_pp", "rto_reinforce_pp")


def _build(name, **keys):
    method = ALGORITHMS[name]
    return method.build(method.config(**keys), lambda _: frozenset())


def _slow_returns(scored, has_dpo, kl_coef, gamma, beta_dpo=0.05, dpo_clip=0.05, penalty=1.0):
    rows = []
    for row, rollout in enumerate(scored.rollouts):
        length = len(rollout.response_ids)
        old, ref, ratio = (
            x[row].tolist() for x in (scored.logp_old_BR, scored.logp_ref_BR, scored.dpo_logratio_BR)
        )
        rewards = [-kl_coef * (old[t] - ref[t]) for t in range(length)]
        rewards[-1] += min(max(float(scored.score_B[row]), -10.0), 10.0)
        rewards[-1] -= penalty if rollout.finish_reason == "length" else 0.0
        if has_dpo:
            dpo = (beta_dpo * ratio[t] for t in range(length))
            rewards = [r + min(max(x, -dpo_clip), dpo_clip) for r, x in zip(rewards, dpo, strict=True)]
        rows.append([sum(gamma ** (k - t) * rewards[k] for k in range(t, length)) for t in range(length)])
    return rows


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_advantages_are_discounted_sums_of_rewards_whitened_over_all_tokens(name, gamma):
    scored = scored_rollouts(9, seed=1, cut=(2, 5))
    experience = _build(name, gamma=gamma).credit(scored, 0.3, no_reduction)
    rows = _slow_returns(scored, "rto" in name, 0.3, gamma)
    everything = [x for row in rows for x in row]
    mean = sum(everything) / len(everything)
    std = math.sqrt(sum((x - mean) ** 2 for x in everything) / len(everything))
    for row, returns in enumerate(rows):
        close(experience.returns_BR[row, : len(returns)], returns)
        close(experience.advantages_BR[row, : len(returns)], [(x - mean) / std for x in returns])
        assert not experience.advantages_BR[row, len(returns) :].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_policy_loss_is_the_clipped_one_and_there_is_no_other(name):
    algorithm = _build(name, clip_eps=0.1)
    experience = algorithm.credit(scored_rollouts(6), 0.01, no_reduction)
    (minibatch,) = step_minibatches(experience, "sequence_mean", range(6), 6, True)
    logp_T = minibatch.logp_old_T + torch.linspace(-0.4, 0.4, len(minibatch.logp_old_T)).double()
    ours, clipped = (
        algorithm.policy_loss(logp_T, minibatch),
        policy_losses.clipped_policy_loss(logp_T, minibatch, 0.1),
    )
    assert torch.equal(ours.loss, clipped.loss)
    assert ours.metrics == clipped.metrics
    assert 0 < ours.metrics["policy/clipfrac_avg"][0] < ours.metrics["policy/clipfrac_avg"][1]
    assert algorithm.value_loss is None and not ALGORITHMS[name].has_critic


def test_the_dpo_reward_is_the_only_difference():
    scored = scored_rollouts(8, seed=3)
    plain, off, on = (
        _build(name, **keys).credit(scored, 0.01, no_reduction)
        for name, keys in (
            ("reinforce_pp", {}),
            ("rto_reinforce_pp", {"beta_dpo": 0.0}),
            ("rto_reinforce_pp", {}),
        )
    )
    assert torch.equal(plain.advantages_BR, off.advantages_BR)
    assert not torch.equal(plain.advantages_BR, on.advantages_BR)
    rto = ALGORITHMS["rto"]
    rto_rewards = rto.build(rto.config(), lambda _: frozenset()).credit(scored, 0.01, no_reduction).rewards
    assert torch.equal(on.rewards.total_BR(), rto_rewards.total_BR())


def test_masked_responses_stay_out_of_the_whitening():
    scored = scored_rollouts(6, seed=2, cut=(1, 4))
    experience = _build("reinforce_pp", truncated="mask").credit(scored, 0.3, no_reduction)
    rows = _slow_returns(scored, False, 0.3, 1.0)
    kept = [x for row, returns in enumerate(rows) if row not in (1, 4) for x in returns]
    mean = sum(kept) / len(kept)
    std = math.sqrt(sum((x - mean) ** 2 for x in kept) / len(kept))
    for row, returns in enumerate(rows):
        expected = [0.0] * len(returns) if row in (1, 4) else [(x - mean) / std for x in returns]
        close(experience.advantages_BR[row, : len(returns)], expected)


@pytest.mark.parametrize("name", NAMES)
def test_critics_metrics_are_not_logged(name):
    algorithm, scored = _build(name), scored_rollouts(4)
    metrics = algorithm.credit_metrics(scored, algorithm.credit(scored, 0.01, no_reduction))
    assert not [key for key in metrics if key.startswith(("value/", "advantage/"))]
    assert ("reward/dpo_per_token" in metrics) == ("rto" in name)


def test_defaults_are_those_of_ppo_without_its_critic():
    ppo = ALGORITHMS["ppo"].config().model_dump()
    for name in NAMES:
        own = ALGORITHMS[name].config().model_dump()
        assert not {"lam", "value_clip", "critic_warmup_steps"} & own.keys()
        assert {key: value for key, value in own.items() if key in ppo}.items() <= ppo.items()
    assert (own["beta_dpo"], own["dpo_clip"]) == (0.05, 0.05)
