"""Token rewards against the golden worked example."""

from dataclasses import replace

import pytest
import torch
from algorithms.grids import GARBAGE, GOLDEN, close, golden_scored, grid

from rto_megatron.algorithms.token_rewards import (
    at_last_token,
    dpo_token_reward,
    kl_k1,
    kl_k3,
    kl_penalty,
    ppo_rewards,
    response_score,
    rto_rewards,
)

CLIPPED = GOLDEN["rto_reward_b1_0.05_clip_0.05"]


def test_rto_reward_equals_worked_example():
    scored = golden_scored()
    rewards = rto_rewards(scored, response_score(scored, 10.0, 0.0), 0.01, 0.05, 0.05)
    close(rewards.dpo_BR, CLIPPED["dpo_token_reward"])
    close(rewards.total_BR(), CLIPPED["token_reward"])
    close(rewards.total_BR().sum(1), CLIPPED["return_sum"])


def test_rto_reward_without_clip_equals_worked_example():
    scored = golden_scored()
    rewards = rto_rewards(scored, response_score(scored, 10.0, 0.0), 0.01, 0.05, None)
    close(rewards.dpo_BR, GOLDEN["rto_reward_b1_0.05_noclip"]["dpo_token_reward"])
    close(rewards.total_BR(), GOLDEN["rto_reward_b1_0.05_noclip"]["token_reward"])


def test_ppo_reward_equals_worked_example():
    scored = golden_scored()
    rewards = ppo_rewards(scored, response_score(scored, 10.0, 0.0), 0.01)
    close(rewards.total_BR(), GOLDEN["ppo_reward_no_dpo"]["token_reward"])
    assert not rewards.dpo_BR.any()


def test_clip_bounds_the_scaled_reward_not_the_log_ratio():
    # Clip first would give 0.05 * 0.05.
    reward_BR = dpo_token_reward(grid([[10.0, -10.0]]), grid([[1, 1]]), beta_dpo=0.05, dpo_clip=0.05)
    close(reward_BR, [[0.05, -0.05]])


@pytest.mark.parametrize("logratio", [3.0, float("inf"), GARBAGE])
def test_zero_beta_dpo_is_exactly_off(logratio):
    reward_BR = dpo_token_reward(grid([[logratio, -logratio]]), grid([[1, 1]]), beta_dpo=0.0, dpo_clip=0.05)
    assert torch.equal(reward_BR, grid([[0.0, 0.0]]))


def test_dpo_reward_is_zero_where_the_dpo_model_equals_its_reference():
    assert not dpo_token_reward(grid([[0.0, 0.0]]), grid([[1, 1]]), beta_dpo=0.05, dpo_clip=0.05).any()


def test_kl_estimators_equal_golden():
    scored = golden_scored()
    logps = scored.logp_old_BR, scored.logp_ref_BR, scored.mask_BR
    close(kl_k1(*logps), GOLDEN["kl_estimators"]["k1"])
    close(kl_k3(*logps), GOLDEN["kl_estimators"]["k3"])
    close(kl_penalty(*logps, 0.01), (-0.01 * grid(GOLDEN["kl_estimators"]["k1"])).tolist())
    close(kl_k1(*logps).sum(1) / scored.mask_BR.sum(1), CLIPPED["kl_masked_mean"])


def test_score_is_clamped_and_the_clamp_can_be_off():
    scored = golden_scored()
    close(response_score(scored, 10.0, 0.0), CLIPPED["rm_clamped"])
    close(response_score(scored, None, 0.0), CLIPPED["rm_normalized"])


def test_clamp_bounds_both_sides():
    scored = replace(golden_scored(), score_B=grid([30.0, -30.0]))
    close(response_score(scored, 4.0, 0.0), [4.0, -4.0])


def test_penalty_lowers_only_cut_responses_and_reaches_below_the_clamp():
    close(response_score(golden_scored(("stop", "length")), 10.0, 1.5), [1.3, -11.5])


def test_score_lands_on_last_action():
    mask_BR = grid([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    score_BR = at_last_token(grid([2.0, 3.0]), mask_BR)
    assert score_BR.nonzero().tolist() == [[row, last] for row, last in enumerate(CLIPPED["last_index"])]
    close(score_BR.sum(1), [2.0, 3.0])


def test_response_without_actions_gets_no_score():
    assert not at_last_token(grid([2.0]), grid([[0, 0, 0]])).any()
