"""Logged sums of a rollout step against hand calculations on the worked example."""

from dataclasses import replace

import pytest
import torch
from algorithms.grids import GARBAGE, GOLDEN, golden_scored, no_reduction, no_vocabulary

from rto_megatron.algorithms import grpo, ppo, rto
from rto_megatron.algorithms.credit_metrics import explained_variance
from rto_megatron.algorithms.rto import Config

K1 = sum(sum(row) for row in GOLDEN["kl_estimators"]["k1"])
K3 = sum(sum(row) for row in GOLDEN["kl_estimators"]["k3"])


def _metrics(config, finish_reasons=("stop", "stop")):
    scored = golden_scored(finish_reasons)
    algorithm = rto.build(config, no_vocabulary)
    return algorithm.credit_metrics(scored, algorithm.credit(scored, 0.01, no_reduction))


def test_rewards_are_logged_before_and_after_clamp_and_penalty():
    metrics = _metrics(Config(), ("length", "stop"))
    assert metrics["objective/scores"] == pytest.approx((1.3 - 22.75, 2))
    assert metrics["reward/score"] == pytest.approx((1.3 - 1.0 - 10.0, 2))
    assert metrics["objective/rlhf_reward"] == pytest.approx((1.3 - 1.0 - 10.0 - 0.01 * K1, 2))


def test_clipped_scores_are_counted():
    assert _metrics(Config())["reward/score_clip_fraction"] == (1, 2)
    assert _metrics(Config(score_clip=30.0))["reward/score_clip_fraction"] == (0, 2)
    assert "reward/score_clip_fraction" not in _metrics(Config(score_clip=None))


def test_kl_is_logged_per_response_and_per_token():
    metrics = _metrics(Config())
    assert metrics["objective/kl"] == pytest.approx((K1, 2))
    assert metrics["policy/kl_per_token"] == pytest.approx((K1, 8))
    assert metrics["policy/kl_k3_per_token"] == pytest.approx((K3, 8))
    assert metrics["reward/kl_per_token"] == pytest.approx((-0.01 * K1, 8))
    assert metrics["objective/entropy"] == pytest.approx((4.8 + 2.35, 2))


def test_dpo_reward_and_clipped_tokens_are_logged():
    golden = sum(sum(row) for row in GOLDEN["rto_reward_b1_0.05_clip_0.05"]["dpo_token_reward"])
    metrics = _metrics(Config())
    assert metrics["reward/dpo_per_token"] == pytest.approx((golden, 8))
    assert metrics["reward/dpo_clip_fraction"] == (2, 8)
    assert _metrics(Config(dpo_clip=None))["reward/dpo_clip_fraction"] == (0, 8)


def test_ppo_logs_no_dpo_reward():
    scored, algorithm = golden_scored(), ppo.build(ppo.Config(), no_vocabulary)
    metrics = algorithm.credit_metrics(scored, algorithm.credit(scored, 0.01, no_reduction))
    assert not [name for name in metrics if "dpo" in name]


def test_lengths_and_truncation_count_responses():
    metrics = _metrics(Config(), ("stop", "length"))
    assert metrics["rollout/response_tokens"] == (8, 2)
    assert metrics["rollout/truncated_fraction"] == (1, 2)


def test_advantages_are_logged_before_whitening():
    raw = [a for row in GOLDEN["gae_gamma1_lambda0.95"]["advantages"] for a in row]
    metrics = _metrics(Config())
    assert metrics["advantage/mean"] == pytest.approx((sum(raw), 8))
    assert metrics["advantage/mean_square"] == pytest.approx((sum(a * a for a in raw), 8))
    mean = metrics["advantage/mean"][0] / 8
    assert mean == pytest.approx(GOLDEN["advantage_normalization"]["mean"])


def test_untrained_responses_stay_out_of_critic_statistics_but_in_the_scores():
    metrics = _metrics(Config(truncated="mask"), ("length", "stop"))
    assert metrics["value/mean"] == pytest.approx((0.7 - 0.6 + 0.2, 3))
    assert metrics["advantage/mean"][1] == 3
    assert metrics["objective/entropy"] == pytest.approx((4.8 + 2.35, 2))
    assert metrics["rollout/response_tokens"] == (8, 2)


def test_padding_does_not_change_metrics():
    scored = golden_scored()
    garbage_BR = GARBAGE * (1 - scored.mask_BR)
    names = ("logp_old_BR", "logp_ref_BR", "dpo_logratio_BR", "values_BR")
    grids = (scored.logp_old_BR, scored.logp_ref_BR, scored.dpo_logratio_BR, scored.values_BR)
    dirty = replace(scored, **{name: x - garbage_BR for name, x in zip(names, grids, strict=True)})
    algorithm = rto.build(Config(), no_vocabulary)
    experience = algorithm.credit(dirty, 0.01, no_reduction)
    assert algorithm.credit_metrics(dirty, experience) == _metrics(Config())


def test_groups_of_one_reward_are_counted():
    scored = golden_scored()
    equal = replace(scored, score_B=torch.tensor([0.5, 0.5]))
    tokens_BR = torch.zeros_like(scored.mask_BR)
    tokens_BR[0, 0] = 0.25
    assert _equal_groups(scored) == (0, 1)
    assert _equal_groups(equal) == (1, 1)
    # What sources pay for tokens counts, but for padding.
    assert _equal_groups(replace(equal, source_BR=tokens_BR)) == (0, 1)
    assert _equal_groups(replace(equal, source_BR=GARBAGE * (1 - scored.mask_BR))) == (1, 1)


def test_groups_are_compared_by_what_is_paid():
    # One of two equal scores loses the penalty of a cut response; two unlike ones are cut to the same bound.
    equal = replace(golden_scored(("length", "stop")), score_B=torch.tensor([0.5, 0.5]))
    assert _equal_groups(equal) == (0, 1)
    assert _equal_groups(equal, truncated="mask") == (1, 1)
    beyond = replace(golden_scored(), score_B=torch.tensor([12.0, 15.0]))
    assert _equal_groups(beyond) == (1, 1)
    assert _equal_groups(beyond, score_clip=None) == (0, 1)


def _equal_groups(scored, **keys):
    algorithm = grpo.build(grpo.Config(samples_per_prompt=2, **keys), no_vocabulary)
    experience = algorithm.credit(scored, 0.0, no_reduction)
    found = algorithm.credit_metrics(scored, experience)["rollout/equal_reward_groups"]
    has_advantage = bool((experience.advantages_BR.abs() > 1e-6).any())
    assert scored.source_BR is not None or has_advantage == (found[0] == 0)
    return found


def test_explained_variance_equals_its_definition():
    means = {name: total / count for name, (total, count) in _metrics(Config()).items()}
    masks = GOLDEN["gae_inputs"]["action_mask"]
    flat = [(r, t) for r, row in enumerate(masks) for t, m in enumerate(row) if m]
    returns = torch.tensor(
        [GOLDEN["gae_gamma1_lambda0.95"]["returns"][r][t] for r, t in flat], dtype=torch.float64
    )
    values = torch.tensor([GOLDEN["gae_inputs"]["values"][r][t] for r, t in flat], dtype=torch.float64)
    expected = 1 - (returns - values).var() / returns.var()
    assert explained_variance(means) == pytest.approx(expected.item(), rel=1e-9)


def test_explained_variance_of_constant_returns_is_undefined():
    zeros = dict.fromkeys(
        ("value/return_mean", "value/return_mean_square", "advantage/mean", "advantage/mean_square"), 0.0
    )
    assert explained_variance(zeros) is None


def test_explained_variance_without_a_trained_token_is_undefined():
    metrics = _metrics(Config(truncated="mask"), ("length", "length"))
    means = {name: total / count for name, (total, count) in metrics.items() if count}
    assert "objective/scores" in means
    assert explained_variance(means) is None
