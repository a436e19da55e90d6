"""DAPO, Dr. GRPO, GSPO, CISPO and RLOO against TRL, autograd and slow loops; RTO's token reward in all of them."""

import math

import pytest
import torch
from algorithms.grids import GARBAGE, close, grid, no_reduction
from algorithms.ragged import LONGEST, scored_rollouts, step_minibatches
from algorithms.trl_losses import trl_grpo, trl_rloo

from rto_megatron.algorithms import ALGORITHMS, groups, losses, policy_losses

GROUP, COUNT = 4, 12
BETA_DPO, DPO_CLIP = 0.3, 0.2
RELATIVE = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
TRL = {
    "dapo": {"loss_type": "dapo", "clip_eps": 0.2, "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", "clip_eps": 0.2, "longest": LONGEST},
    "gspo": {"loss_type": "grpo", "clip_eps": 3e-4, "epsilon_high": 4e-4, "level": "sequence"},
    "cispo": {"loss_type": "cispo", "clip_eps": 0.2, "epsilon_high": 1.5},  # TRL names the bound itself
}
OURS = {"cispo": {"clip_eps_high": 0.5}}


def _build(name, **keys):
    method = ALGORITHMS[name]
    return method.build(method.config(samples_per_prompt=GROUP, **keys), lambda _: frozenset())


def _moved(experience, seed=5, by=0.3):
    """Log-probs of a policy that has moved far enough for some ratios to be bounded."""
    noise_BR = torch.randn(experience.mask_BR.shape, generator=torch.Generator().manual_seed(seed)).double()
    return losses.keep(experience.logp_old_BR + by * noise_BR, experience.mask_BR).requires_grad_()


def _positions(values_BR, experience, minibatch):
    """Values at the positions that predict the tokens, [T]; differentiable."""
    values_T = torch.zeros_like(minibatch.weight_T)
    for row, rollout in enumerate(experience.rollouts):
        first = minibatch.batch.cu_seqlens[row] + len(rollout.prompt_ids) - 1
        places = torch.arange(first, first + len(rollout.response_ids))
        values_T = values_T.index_put((places,), values_BR[row, : len(places)])
    return values_T


def _loss(algorithm, experience, logp_BR, entropies_BR=None):
    weighting = algorithm.config.loss_weights
    (minibatch,) = step_minibatches(experience, weighting, range(COUNT), COUNT, True)
    logp_T = _positions(logp_BR, experience, minibatch)
    if entropies_BR is not None:
        entropy_T = _positions(entropies_BR, experience, minibatch)
        garbage_T = torch.full_like(entropy_T, GARBAGE)  # what stands where nothing is weighed counts nowhere
        logp_T = torch.stack([logp_T, torch.where(minibatch.weight_T != 0, entropy_T, garbage_T)])
    output = algorithm.update_loss()(logp_T, minibatch)
    inputs = [logp_BR] if entropies_BR is None else [logp_BR, entropies_BR]
    return output, torch.autograd.grad(output.loss, inputs)


def _trl(experience, logp_BR, **keys):
    old_BR, ref_BR = (
        losses.keep(x, experience.mask_BR) for x in (experience.logp_old_BR, experience.logp_ref_BR)
    )
    advantages_B = experience.advantages_BR[:, 0]
    return trl_grpo(logp_BR, old_BR, ref_BR, advantages_B, experience.mask_BR, **keys)


@pytest.mark.parametrize("beta_kl", [0.0, 0.1])
@pytest.mark.parametrize("name", TRL)
def test_loss_and_gradient_equal_trl(name, beta_kl):
    algorithm = _build(name, beta_kl=beta_kl, **OURS.get(name, {}))
    experience = algorithm.credit(scored_rollouts(COUNT, seed=4), 0.0, no_reduction)
    logp_BR = _moved(experience)
    output, (grad_BR,) = _loss(algorithm, experience, logp_BR)
    loss, _ = _trl(experience, logp_BR, beta=beta_kl, **TRL[name])
    (expected_BR,) = torch.autograd.grad(loss, logp_BR)
    close(output.loss, loss.item())
    close(grad_BR, expected_BR.tolist())
    total, count = output.metrics["policy/clipfrac_avg"]
    assert 0 < total < count
    print(f"{name}: loss differs from TRL's by {abs(output.loss.item() - loss.item()):.1e}")


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_dual_clip_is_trls_two_sided_one(name):
    algorithm = _build(name, dual_clip=1.5, beta_kl=0.0)
    experience = algorithm.credit(scored_rollouts(COUNT, seed=4), 0.0, no_reduction)
    logp_BR = _moved(experience, by=0.8)
    output, (grad_BR,) = _loss(algorithm, experience, logp_BR)
    keys = TRL.get(name, {"clip_eps": 0.2})
    loss, _ = _trl(experience, logp_BR, beta=0.0, delta=1.5, **keys)
    (expected_BR,) = torch.autograd.grad(loss, logp_BR)
    close(output.loss, loss.item())
    close(grad_BR, expected_BR.tolist())
    plain, _ = _loss(_build(name, beta_kl=0.0), experience, logp_BR)
    assert plain.loss != output.loss
    bound = sum(
        bool(
            experience.advantages_BR[row, t] < 0
            and logp_BR[row, t] - experience.logp_old_BR[row, t] > math.log(1.5)
        )
        for row, rollout in enumerate(experience.rollouts)
        for t in range(len(rollout.response_ids))
    )
    assert output.metrics["policy/dual_clipfrac_avg"][0] == bound > 0


def test_an_entropy_bonus_equals_trls_where_both_take_the_mean_over_tokens():
    algorithm = _build("dapo", entropy_coef=0.07)
    experience = algorithm.credit(scored_rollouts(COUNT, seed=4), 0.0, no_reduction)
    logp_BR = _moved(experience)
    entropies_BR = (
        torch.rand(logp_BR.shape, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    )
    output, grads = _loss(algorithm, experience, logp_BR, entropies_BR)
    loss, metrics = _trl(
        experience, logp_BR, beta=0.0, entropy_coef=0.07, entropies_BR=entropies_BR, **TRL["dapo"]
    )
    close(output.loss, loss.item())
    for ours, theirs in zip(grads, torch.autograd.grad(loss, [logp_BR, entropies_BR]), strict=True):
        close(ours, theirs.tolist())
    total, count = output.metrics["policy/entropy_avg"]
    assert total / count == pytest.approx(metrics["entropy"], rel=1e-6)


def test_rloo_on_its_own_samples_has_the_gradient_of_trl():
    """TRL's ratio is 1 there; ours divides by the longest response, a constant."""
    algorithm = _build("rloo")
    experience = algorithm.credit(scored_rollouts(COUNT, seed=4), 0.3, no_reduction)
    logp_BR = losses.keep(experience.logp_old_BR, experience.mask_BR).requires_grad_()
    _, (grad_BR,) = _loss(algorithm, experience, logp_BR)
    loss = trl_rloo(logp_BR, logp_BR.detach(), experience.advantages_BR[:, 0], experience.mask_BR)
    (expected_BR,) = torch.autograd.grad(loss, logp_BR)
    close(grad_BR, (expected_BR / LONGEST).tolist())


def _slow_gspo_token(experience, logp_BR):
    """Eq. 13 of the paper, with stop-gradients: one ratio per response, one advantage per token."""
    total = grid(0.0)
    for row, rollout in enumerate(experience.rollouts):
        length = len(rollout.response_ids)
        ratios = [logp_BR[row, t] - experience.logp_old_BR[row, t] for t in range(length)]
        of_response = torch.exp(sum(ratios) / length).detach()
        for t in range(length):
            ratio = of_response * torch.exp(logp_BR[row, t]) / torch.exp(logp_BR[row, t]).detach()
            advantage = experience.advantages_BR[row, t]
            bounded = ratio.clamp(1 - 3e-4, 1 + 4e-4)
            total = total - torch.minimum(ratio * advantage, bounded * advantage) / length / COUNT
    return total


def test_gspo_with_an_advantage_per_token_is_gspo_token():
    algorithm = _build("gspo", beta_dpo=BETA_DPO)
    experience = algorithm.credit(scored_rollouts(COUNT, seed=4), 0.0, no_reduction)
    assert len(set(experience.advantages_BR[2, :7].tolist())) > 1
    logp_BR = _moved(experience, by=2e-3)
    output, (grad_BR,) = _loss(algorithm, experience, logp_BR)
    expected = _slow_gspo_token(experience, logp_BR)
    close(output.loss, expected.item())
    close(grad_BR, torch.autograd.grad(expected, logp_BR)[0].tolist())


def _slow_advantages(scored, name, beta_kl, beta_dpo):
    """Outcome less its baseline, and what is still to come of the DPO rewards less theirs; one token at a time."""
    rows = [range(start, start + GROUP) for start in range(0, COUNT, GROUP)]
    dpo, outcome = [], []
    for row, rollout in enumerate(scored.rollouts):
        ratios = scored.dpo_logratio_BR[row, : len(rollout.response_ids)].tolist()
        dpo.append([min(max(beta_dpo * x, -DPO_CLIP), DPO_CLIP) for x in ratios])
        k1 = sum(float(scored.logp_old_BR[row, t] - scored.logp_ref_BR[row, t]) for t in range(len(ratios)))
        outcome.append(float(scored.score_B[row]) - (beta_kl * k1 if name == "rloo" else 0.0))
    found = []
    for group in rows:
        total = [outcome[i] + sum(dpo[i]) for i in group]
        mean = sum(total) / GROUP
        std = math.sqrt(sum((x - mean) ** 2 for x in total) / (GROUP - 1)) + 1e-4
        for i in group:
            compared = [j for j in group if name != "rloo" or j != i]
            base = sum(outcome[j] for j in compared) / len(compared)
            typical = sum(sum(dpo[j]) / len(dpo[j]) for j in compared) / len(compared)
            scale = 1.0 if name in ("rloo", "dr_grpo") else std
            ahead = [sum(dpo[i][t:]) - typical * len(dpo[i][t:]) for t in range(len(dpo[i]))]
            found.append([(outcome[i] - base + x) / scale for x in ahead])
    return found


@pytest.mark.parametrize("beta_dpo", [0.0, BETA_DPO])
@pytest.mark.parametrize("name", [*RELATIVE, "rloo"])
def test_advantages_equal_a_slow_loop_with_and_without_rtos_token_reward(name, beta_dpo):
    scored = scored_rollouts(COUNT, seed=1)
    keys = {"beta_dpo": beta_dpo, "dpo_clip": DPO_CLIP} if beta_dpo else {}
    algorithm = _build(name, **keys)
    experience = algorithm.credit(scored, 0.3, no_reduction)
    for row, expected in enumerate(_slow_advantages(scored, name, 0.3, beta_dpo)):
        close(experience.advantages_BR[row, : len(expected)], expected)
        assert not experience.advantages_BR[row, len(expected) :].any()
    assert algorithm.needs_dpo == (beta_dpo > 0)
    assert (experience.rewards.num_clipped > 0) == (beta_dpo > 0)


def test_groups_with_one_score_are_not_informative():
    scores = grid([1.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    assert groups.informative(scores, 2).tolist() == [False, False, True]
    assert groups.informative(scores, 3).tolist() == [True, True]


def test_defaults_are_those_of_the_papers():
    dapo, dr_grpo, gspo, cispo, rloo = (
        ALGORITHMS[name].config() for name in ("dapo", "dr_grpo", "gspo", "cispo", "rloo")
    )
    assert (dapo.clip_eps, dapo.clip_eps_high, dapo.loss_weights, dapo.beta_kl) == (
        0.2,
        0.28,
        "token_mean",
        0,
    )
    assert (dapo.samples_per_prompt, dapo.max_sampling_rounds, dr_grpo.max_sampling_rounds) == (16, 10, None)
    assert (dr_grpo.loss_weights, dr_grpo.beta_kl, dr_grpo.clip_eps) == ("constant", 0, 0.2)
    assert (gspo.clip_eps, gspo.clip_eps_high, gspo.loss_weights) == (3e-4, 4e-4, "sequence_mean")
    assert (cispo.clip_eps, cispo.clip_eps_high, cispo.loss_weights) == (None, 4.0, "token_mean")
    assert (rloo.samples_per_prompt, rloo.loss_weights, rloo.beta_kl) == (4, "constant", 0.01)


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("rloo", {"epochs": 2}, "has no ratio that corrects for it"),
        ("rloo", {"clip_eps": 0.1}, "Extra inputs are not permitted"),
        ("rloo", {"gamma": 0.9}, "Extra inputs are not permitted"),
        ("cispo", {"dual_clip": 3.0}, "Extra inputs are not permitted"),
        ("grpo", {"dual_clip": 1.0}, "greater than 1"),
        ("ppo", {"max_sampling_rounds": 3}, "Extra inputs are not permitted"),
        ("grpo", {"dpo_clip": 0.1}, "dpo_clip=0.1 has no effect with beta_dpo=0"),
        ("rto", {"beta_dpo": 0, "dpo_clip": None}, "dpo_clip=null has no effect with beta_dpo=0"),
        (
            "semi_rto",
            {"beta_dpo": 0, "delimiters": [";"]},
            r'delimiters=\[";"\] has no effect with beta_dpo=0',
        ),
    ],
)
def test_keys_without_effect_are_refused(name, keys, says):
    with pytest.raises(ValueError, match=says):
        ALGORITHMS[name].config(**keys)


def test_the_loss_without_a_ratio_is_minus_the_weighted_log_prob():
    algorithm = _build("rloo")
    experience = algorithm.credit(scored_rollouts(COUNT, seed=4), 0.1, no_reduction)
    logp_BR = _moved(experience)
    output, (grad_BR,) = _loss(algorithm, experience, logp_BR)
    expected = sum(
        -experience.advantages_BR[row, t] * logp_BR[row, t] / (COUNT * LONGEST)
        for row, rollout in enumerate(experience.rollouts)
        for t in range(len(rollout.response_ids))
    )
    close(output.loss, expected.item())
    close(grad_BR, torch.autograd.grad(expected, logp_BR)[0].tolist())
    assert "policy/clipfrac_avg" not in output.metrics
    assert policy_losses.reinforce_loss is algorithm.policy_loss
