"""Token rewards against the golden worked example, and what moving the DPO reward leaves unchanged."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from algorithms.grids import GARBAGE, GOLDEN, close, golden_scored, grid, no_reduction

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.algorithms.token_rewards import (
    all_at_end,
    as_it_is,
    at_last_token,
    at_sentence_ends,
    dpo_token_reward,
    kl_k1,
    kl_k3,
    kl_penalty,
    less_sum_at_end,
    ppo_rewards,
    response_score,
    rto_rewards,
    score_rewards,
)
from rto_megatron.types import ScoredRollouts

CLIPPED = GOLDEN["rto_reward_b1_0.05_clip_0.05"]
DELIMITER = 7
ENDS = partial(at_sentence_ends, delimiter_ids=frozenset({DELIMITER}))
REDISTRIBUTIONS = {"rto": as_it_is, "ddpo": all_at_end, "rs_ppo": less_sum_at_end, "semi_rto": ENDS}
RELATIVE = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")  # their KL is a term of the loss
WITH_DPO = [name for name, m in ALGORITHMS.items() if isinstance(m, OnlineMethod) and m.has_dpo]
LENGTHS = (7, 4, 1)


def random_scored(seed, delimiters=0.3):
    """Ragged responses, in which a token is a delimiter with the given probability; garbage behind their ends."""
    generator = torch.Generator().manual_seed(seed)
    mask_BR = grid([[float(t < length) for t in range(7)] for length in LENGTHS])
    logps = 3 * torch.randn(3, 3, 7, generator=generator, dtype=torch.float64) + GARBAGE * (1 - mask_BR)
    is_delimiter_BR = torch.rand(3, 7, generator=generator) < delimiters
    first = golden_scored().rollouts[0]
    rollouts = tuple(
        replace(first, response_ids=tuple(DELIMITER if ends else 4 for ends in row[:length]))
        for row, length in zip(is_delimiter_BR.tolist(), LENGTHS, strict=True)
    )
    logp_old_BR, logp_ref_BR, logratio_BR = logps
    score_B, nothing_B = torch.randn(3, generator=generator, dtype=torch.float64), grid([0.0] * 3)
    return ScoredRollouts(
        rollouts,
        mask_BR,
        mask_BR,
        logp_old_BR,
        logp_old_BR,
        logp_ref_BR,
        logratio_BR,
        torch.zeros_like(mask_BR),
        nothing_B,
        score_B,
    )


def rewards_of(method, scored, dpo_clip):
    return rto_rewards(scored, scored.score_B, 0.01, 0.05, dpo_clip, REDISTRIBUTIONS[method])


def test_rto_reward_equals_worked_example():
    scored = golden_scored()
    rewards = rto_rewards(scored, response_score(scored, 10.0, "penalise", 0.0), 0.01, 0.05, 0.05, as_it_is)
    close(rewards.dpo_BR, CLIPPED["dpo_token_reward"])
    close(rewards.total_BR(), CLIPPED["token_reward"])
    close(rewards.total_BR().sum(1), CLIPPED["return_sum"])


def test_rto_reward_without_clip_equals_worked_example():
    scored = golden_scored()
    rewards = rto_rewards(scored, response_score(scored, 10.0, "penalise", 0.0), 0.01, 0.05, None, as_it_is)
    close(rewards.dpo_BR, GOLDEN["rto_reward_b1_0.05_noclip"]["dpo_token_reward"])
    close(rewards.total_BR(), GOLDEN["rto_reward_b1_0.05_noclip"]["token_reward"])


def test_ppo_reward_equals_worked_example():
    scored = golden_scored()
    rewards = ppo_rewards(scored, response_score(scored, 10.0, "penalise", 0.0), 0.01)
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
    close(response_score(scored, 10.0, "penalise", 0.0), CLIPPED["rm_clamped"])
    close(response_score(scored, None, "penalise", 0.0), CLIPPED["rm_normalized"])


def test_clamp_bounds_both_sides():
    scored = replace(golden_scored(), score_B=grid([30.0, -30.0]))
    close(response_score(scored, 4.0, "penalise", 0.0), [4.0, -4.0])


def test_penalty_lowers_only_cut_responses_and_reaches_below_the_clamp():
    close(response_score(golden_scored(("stop", "length")), 10.0, "penalise", 1.5), [1.3, -11.5])


def test_score_lands_on_last_action():
    mask_BR = grid([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    score_BR = at_last_token(grid([2.0, 3.0]), mask_BR)
    assert score_BR.nonzero().tolist() == [[row, last] for row, last in enumerate(CLIPPED["last_index"])]
    close(score_BR.sum(1), [2.0, 3.0])


def test_response_without_actions_gets_no_score():
    assert not at_last_token(grid([2.0]), grid([[0, 0, 0]])).any()


@pytest.mark.parametrize(("method", "key"), [("ddpo", "ddpo_reward_delayed"), ("rs_ppo", "rs_ppo_reward")])
def test_moved_rewards_equal_worked_example(method, key):
    scored = golden_scored()
    score_B = response_score(scored, 10.0, "penalise", 0.0)
    rewards = rto_rewards(scored, score_B, 0.01, 0.05, None, REDISTRIBUTIONS[method])
    close(rewards.total_BR(), GOLDEN[key]["token_reward"])


def test_semi_rto_reward_equals_worked_example():
    golden, scored = GOLDEN["semi_rto_reward"], golden_scored()
    marked = tuple(
        replace(r, response_ids=tuple(DELIMITER if m else 4 for m in row[: len(r.response_ids)]))
        for r, row in zip(scored.rollouts, golden["delimiter_mask"], strict=True)
    )
    scored = replace(scored, rollouts=marked)
    rewards = rto_rewards(scored, response_score(scored, 10.0, "penalise", 0.0), 0.01, 0.05, None, ENDS)
    close(rewards.dpo_BR, golden["dpo_reward"])
    close(rewards.total_BR(), golden["token_reward"])


@pytest.mark.parametrize("dpo_clip", [None, 0.05])
@pytest.mark.parametrize("seed", range(5))
def test_a_response_is_paid_the_same_wherever_its_dpo_reward_lands(seed, dpo_clip):
    scored = random_scored(seed)
    rto_B = rewards_of("rto", scored, dpo_clip).total_BR().sum(1)
    ppo_B = ppo_rewards(scored, scored.score_B, 0.01).total_BR().sum(1)
    assert ((rto_B - ppo_B).abs() > 1e-3).any()
    close(rewards_of("ddpo", scored, dpo_clip).total_BR().sum(1), rto_B.tolist())
    close(rewards_of("semi_rto", scored, dpo_clip).total_BR().sum(1), rto_B.tolist())
    close(rewards_of("rs_ppo", scored, dpo_clip).total_BR().sum(1), ppo_B.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_sentences_are_paid_at_their_ends_by_a_slow_loop(seed):
    scored = random_scored(seed)
    rewards = rewards_of("semi_rto", scored, 0.1)
    for row, (rollout, length) in enumerate(zip(scored.rollouts, LENGTHS, strict=True)):
        expected, waiting = [0.0] * 7, 0.0
        for t in range(length):
            waiting += min(max(0.05 * float(scored.dpo_logratio_BR[row, t]), -0.1), 0.1)
            if rollout.response_ids[t] == DELIMITER or t == length - 1:
                expected[t], waiting = waiting, 0.0
        close(rewards.dpo_BR[row], expected)


@pytest.mark.parametrize(
    ("response_ids", "expected"),
    [
        ((DELIMITER, 4, DELIMITER), [1.0, 0.0, 6.0]),
        ((4, 4, DELIMITER), [0.0, 0.0, 7.0]),
        ((4, 4, 4), [0.0, 0.0, 7.0]),
        ((DELIMITER, DELIMITER, DELIMITER), [1.0, 2.0, 4.0]),
        ((DELIMITER, 4, 4), [1.0, 0.0, 6.0]),
    ],
    ids=["last token", "only last token", "none", "all", "first token"],
)
def test_delimiters_by_hand(response_ids, expected):
    scored = golden_scored()
    (rollout, _) = scored.rollouts
    scored = replace(
        scored, rollouts=(replace(rollout, response_ids=response_ids),), mask_BR=grid([[1, 1, 1, 0]])
    )
    close(ENDS(grid([[1.0, 2.0, 4.0, 0.0]]), scored), [[*expected, 0.0]])


@pytest.mark.parametrize("method", REDISTRIBUTIONS)
def test_padding_never_reaches_a_reward(method):
    scored = random_scored(1)
    clean = replace(scored, dpo_logratio_BR=torch.where(scored.mask_BR != 0, scored.dpo_logratio_BR, 0.0))
    for dpo_clip in (None, 0.05):
        dirty_rewards, clean_rewards = (rewards_of(method, one, dpo_clip) for one in (scored, clean))
        assert torch.equal(dirty_rewards.total_BR(), clean_rewards.total_BR())
        assert not dirty_rewards.total_BR()[scored.mask_BR == 0].any()
        assert dirty_rewards.num_clipped == clean_rewards.num_clipped


@pytest.mark.parametrize("method", REDISTRIBUTIONS)
def test_clipped_tokens_are_counted_before_rewards_move(method):
    scored = golden_scored()
    expected = sum(
        abs(0.05 * float(x)) > 0.05
        for x, m in zip(scored.dpo_logratio_BR.flatten(), scored.mask_BR.flatten(), strict=True)
        if m
    )
    assert rewards_of(method, scored, 0.05).num_clipped == expected > 0
    assert rewards_of(method, scored, None).num_clipped == 0


@pytest.mark.parametrize("name", WITH_DPO)
def test_every_dpo_reward_is_zero_where_the_dpo_model_equals_its_reference(name):
    method = ALGORITHMS[name]
    group = {} if method.config().samples_per_prompt == 1 else {"samples_per_prompt": 3}
    algorithm = method.build(method.config(beta_dpo=0.05, **group), lambda _: frozenset({DELIMITER}))
    beside = score_rewards if name in RELATIVE else ppo_rewards
    for is_equal in (True, False):
        scored = random_scored(2)
        if is_equal:
            scored = replace(scored, dpo_logratio_BR=torch.zeros_like(scored.dpo_logratio_BR))
        rewards = algorithm.credit(scored, 0.01, no_reduction).rewards
        assert bool(rewards.dpo_BR.any()) != is_equal
        score_B = response_score(scored, 10.0, "penalise", 1.0)
        is_ppo = torch.equal(rewards.total_BR(), beside(scored, score_B, 0.01).total_BR())
        assert is_ppo == is_equal


def test_bootstrapped_responses_are_not_paid_a_score():
    close(response_score(golden_scored(("length", "stop")), 10.0, "bootstrap", 1.0), [0.0, -10.0])
    close(response_score(golden_scored(("stop", "stop")), 10.0, "bootstrap", 1.0), [1.3, -10.0])
