"""RTO and PPO from scored rollouts to losses."""

from dataclasses import replace

import pydantic
import pytest
import torch
from algorithms.grids import GOLDEN, close, golden_scored, grid, no_reduction, no_vocabulary, ppo_minibatch

from rto_megatron.algorithms import ALGORITHMS, losses, policy_losses, ppo, rto

MASK = grid(GOLDEN["rto_reward_inputs"]["action_mask"])


def build_rto(**keys):
    return rto.build(rto.Config(**keys), no_vocabulary)


def build_ppo(**keys):
    return ppo.build(ppo.Config(**keys), no_vocabulary)


def _grids(experience):
    rewards = experience.rewards
    return [
        experience.mask_BR,
        experience.advantages_BR,
        experience.returns_BR,
        rewards.score_BR,
        rewards.kl_BR,
        rewards.dpo_BR,
        rewards.total_BR(),
    ]


def test_defaults_are_the_released_script():
    config = rto.Config()
    assert (config.beta_dpo, config.dpo_clip, config.beta_kl, config.score_clip) == (0.05, 0.05, 0.01, 10)
    assert (config.gamma, config.lam, config.clip_eps, config.value_clip) == (1, 0.95, 0.2, 0.2)
    assert (config.loss_weights, config.epochs, config.kl_target) == ("sequence_mean", 1, None)


def test_rto_credit_equals_golden():
    experience = build_rto().credit(golden_scored(), 0.01, no_reduction)
    close(experience.rewards.total_BR(), GOLDEN["rto_reward_b1_0.05_clip_0.05"]["token_reward"])
    close(experience.returns_BR, GOLDEN["gae_gamma1_lambda0.95"]["returns"])
    close(experience.advantages_BR, GOLDEN["advantage_normalization"]["normalized"])


def test_gamma_and_lambda_reach_the_estimator():
    experience = build_rto(gamma=0.99, lam=0.9).credit(golden_scored(), 0.01, no_reduction)
    close(experience.returns_BR, GOLDEN["gae_gamma0.99_lambda0.9"]["returns"])


def test_paper_preset_does_not_clip_the_dpo_reward():
    experience = build_rto(dpo_clip=None).credit(golden_scored(), 0.01, no_reduction)
    close(experience.rewards.total_BR(), GOLDEN["rto_reward_b1_0.05_noclip"]["token_reward"])


def test_ppo_credit_ignores_the_dpo_model():
    experience = build_ppo().credit(golden_scored(), 0.01, no_reduction)
    close(experience.rewards.total_BR(), GOLDEN["ppo_reward_no_dpo"]["token_reward"])


@pytest.mark.parametrize("algorithm", [build_rto(score_clip=0.5), build_ppo(score_clip=0.5)])
def test_score_clip_and_kl_coefficient_of_the_step_reach_the_rewards(algorithm):
    rewards = algorithm.credit(golden_scored(), 0.2, no_reduction).rewards
    close(rewards.score_BR.sum(1), [0.5, -0.5])
    close(rewards.kl_BR, (-0.2 * grid(GOLDEN["kl_estimators"]["k1"])).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rto_with_zero_beta_dpo_is_bit_equal_to_ppo(dtype):
    generator = torch.Generator().manual_seed(3)
    names = ("logp_old_BR", "logp_ref_BR", "dpo_logratio_BR", "values_BR")
    noise = {name: torch.randn(2, 6, generator=generator, dtype=dtype) for name in names}
    scored = golden_scored(("stop", "length"))
    vectors = {"score_B": scored.score_B.to(dtype), "bootstrap_B": scored.bootstrap_B.to(dtype)}
    scored = replace(scored, mask_BR=scored.mask_BR.to(dtype), **vectors, **noise)
    ours = build_rto(beta_dpo=0).credit(scored, 0.01, no_reduction)
    theirs = build_ppo().credit(scored, 0.01, no_reduction)
    for left, right in zip(_grids(ours), _grids(theirs), strict=True):
        assert left.dtype == right.dtype == dtype
        assert torch.equal(left, right)


def test_rto_has_the_losses_of_ppo():
    minibatch = ppo_minibatch(losses.sequence_mean_weights(MASK, 2.0), packed=True)
    logp_T, values_T = minibatch.logp_old_T + 0.3, minibatch.values_old_T + 0.3
    for algorithm in (
        build_rto(clip_eps=0.1, value_clip=0.1),
        build_ppo(clip_eps=0.1, value_clip=0.1),
    ):
        policy = policy_losses.clipped_policy_loss(logp_T, minibatch, 0.1)
        value = losses.clipped_value_loss(values_T, minibatch, 0.1)
        assert torch.equal(algorithm.policy_loss(logp_T, minibatch).loss, policy.loss)
        assert torch.equal(algorithm.value_loss(values_T, minibatch).loss, value.loss)


def test_dpo_model_is_needed_only_where_it_is_read():
    assert build_rto().needs_dpo
    assert not build_rto(beta_dpo=0).needs_dpo
    assert not build_ppo().needs_dpo


def test_penalise_lowers_the_score_of_cut_responses():
    scored = golden_scored(("length", "stop"))
    experience = build_rto(truncated_penalty=0.75).credit(scored, 0.01, no_reduction)
    close(experience.rewards.score_BR.sum(1), [1.3 - 0.75, -10.0])
    assert torch.equal(experience.mask_BR, MASK)


@pytest.mark.parametrize("policy", ["compat", "mask"])
def test_other_policies_leave_the_score_alone(policy):
    experience = build_rto(truncated=policy).credit(golden_scored(("length", "stop")), 0.01, no_reduction)
    close(experience.rewards.score_BR.sum(1), [1.3, -10.0])


def test_mask_leaves_cut_responses_out_of_loss_and_whitening():
    scored = golden_scored(("length", "stop"))
    experience = build_rto(truncated="mask").credit(scored, 0.01, no_reduction)
    close(experience.mask_BR, [[0.0] * 6, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    assert not experience.advantages_BR[0].any()
    raw = GOLDEN["gae_gamma1_lambda0.95"]["advantages"][1][:3]
    mean = sum(raw) / 3
    std = (sum((x - mean) ** 2 for x in raw) / 3) ** 0.5
    close(experience.advantages_BR[1, :3], [(x - mean) / std for x in raw])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"truncated": "mask", "truncated_penalty": 2.0}, "truncated_penalty=2.0 has no effect"),
        ({"kl_horizon": 5}, "kl_horizon=5 has no effect"),
        ({"kl_target": 0.1, "beta_kl": 0}, "kl_target=0.1 cannot steer beta_kl=0"),
        ({"beta_dpo": -0.1}, "greater than or equal to 0"),
        ({"preset": "paper"}, "Extra inputs"),
    ],
)
def test_config_refuses_what_it_would_ignore(keys, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        rto.Config(**keys)


def test_config_survives_being_saved_with_all_its_keys():
    config = rto.Config(truncated="mask", kl_target=0.1, kl_horizon=77)
    assert rto.Config(**config.model_dump()) == config


def test_every_method_of_the_paper_is_registered():
    offline = {"sft", "reward_model", "dpo", "rdpo", "simpo", "tdpo", "kto"}
    critic_free = {"reinforce_pp", "rto_reinforce_pp", "grpo"}
    assert set(ALGORITHMS) >= {*offline, "ppo", "rto", "semi_rto", "ddpo", "rs_ppo", *critic_free}
