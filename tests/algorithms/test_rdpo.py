"""R-DPO against golden numbers, and its sign against the optimum that it is derived from.

TRL 1.16 has no R-DPO, so there is nothing of TRL's to call.
"""

from dataclasses import replace

import pytest
import torch
from algorithms.grids import GARBAGE, GOLDEN, close, grid
from algorithms.pairs import LENGTHS, first_positions, golden_pairs, spread

from rto_megatron.algorithms import dpo
from rto_megatron.algorithms.rdpo import RDPO, Config

LAYOUTS = pytest.mark.parametrize("packed", [True, False])


@LAYOUTS
@pytest.mark.parametrize(
    ("alpha", "key"), [(0.001, "rdpo_beta0.1_alpha0.001"), (0.05, "rdpo_beta0.1_alpha0.05")]
)
def test_loss_gradient_and_rewards_equal_golden(packed, alpha, key):
    logp_T, micro = golden_pairs(packed)
    output = RDPO(Config(alpha=alpha)).loss(logp_T, micro)
    output.loss.backward()
    golden = GOLDEN[key]
    close(output.loss, golden["loss_mean"])
    close(
        logp_T.grad[first_positions(micro)],
        golden["grad_policy_chosen_logps"] + golden["grad_policy_rejected_logps"],
    )
    assert (logp_T.grad != 0).sum() == sum(LENGTHS)
    chosen, rejected = golden["chosen_rewards"], golden["rejected_rewards"]
    assert output.metrics["rewards/chosen"] == pytest.approx((sum(chosen), 3))
    assert output.metrics["rewards/margins"] == pytest.approx((sum(chosen) - sum(rejected), 3))
    assert output.metrics["rewards/accuracies"] == (2, 3)


def _objective(pi_Y, pi_ref_Y, penalised_Y, beta):
    """E[r - alpha |y|] - beta KL(pi || pi_ref) over a list of all answers."""
    return (pi_Y * penalised_Y).sum() - beta * (pi_Y * (pi_Y / pi_ref_Y).log()).sum()


@pytest.mark.parametrize("seed", range(3))
def test_sign_of_the_length_follows_from_the_penalised_optimum(seed):
    generator = torch.Generator().manual_seed(seed)
    beta, alpha, lengths = 0.4, 0.07, [3, 9, 1, 14]
    length_Y, reward_Y = grid(lengths), torch.randn(4, generator=generator).double()
    pi_ref_Y = torch.randn(4, generator=generator).double().softmax(0)
    penalised_Y = reward_Y - alpha * length_Y
    optimum_Y = pi_ref_Y * (penalised_Y / beta).exp()
    optimum_Y = optimum_Y / optimum_Y.sum()
    best = _objective(optimum_Y, pi_ref_Y, penalised_Y, beta)
    for _ in range(200):
        other_Y = (optimum_Y.log() + 0.1 * torch.randn(4, generator=generator).double()).softmax(0)
        assert _objective(other_Y, pi_ref_Y, penalised_Y, beta) < best

    worst_with_minus = 0.0
    for chosen, rejected in [(0, 1), (1, 0), (2, 3), (3, 1)]:
        pair = [chosen, rejected]
        logp_T, micro = spread(optimum_Y[pair].log(), [lengths[y] for y in pair], packed=True)
        micro = replace(micro, logp_ref_S=pi_ref_Y[pair].log())
        bradley_terry = (reward_Y[chosen] - reward_Y[rejected]).sigmoid()
        close((-RDPO(Config(beta=beta, alpha=alpha)).loss(logp_T, micro).loss).exp(), bradley_terry.item())
        log_odds_P = (optimum_Y[pair] / pi_ref_Y[pair]).log()
        with_minus = beta * (log_odds_P[0] - log_odds_P[1]) - alpha * (length_Y[chosen] - length_Y[rejected])
        worst_with_minus = max(worst_with_minus, (with_minus.sigmoid() - bradley_terry).abs().item())
    assert worst_with_minus > 0.1
    print(f"a minus would be off by {worst_with_minus:.2f}")


def test_longer_chosen_answer_is_pushed_less():
    logp_T, micro = spread(grid([-8.0, -8.0, -8.0, -8.0]), [20, 2, 2, 20], packed=True)
    RDPO(Config(alpha=0.05)).loss(logp_T, micro).loss.backward()
    first = first_positions(micro)
    assert logp_T.grad[first[0]].abs() < logp_T.grad[first[1]].abs()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_length_penalty_it_is_dpo(smoothing):
    config = Config(alpha=0, label_smoothing=smoothing)
    want = dpo.DPO(dpo.Config(label_smoothing=smoothing)).loss(*golden_pairs(True))
    have = RDPO(config).loss(*golden_pairs(True))
    assert torch.equal(have.loss, want.loss)
    assert have.metrics == want.metrics


def test_smoothing_mixes_both_labels():
    golden_key, smoothing = "rdpo_beta0.1_alpha0.05", 0.2
    plain_P = grid(GOLDEN[golden_key]["losses"])
    margins_P = torch.log(1 / torch.expm1(plain_P))  # plain = log(1 + exp(-margin))
    flipped_P = plain_P + margins_P
    mixed = ((1 - smoothing) * plain_P + smoothing * flipped_P).mean().item()
    close(RDPO(Config(alpha=0.05, label_smoothing=smoothing)).loss(*golden_pairs(True)).loss, mixed)


@LAYOUTS
def test_padding_does_not_change_loss_or_gradient(packed):
    outcomes = []
    for padding in (0.0, GARBAGE, -1e300):
        logp_T, micro = golden_pairs(packed, padding)
        output = RDPO(Config()).loss(logp_T, micro)
        output.loss.backward()
        outcomes.append((output.loss.item(), logp_T.grad.tolist(), output.metrics))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_pair_of_weight_zero_counts_nowhere():
    logp_T, micro = golden_pairs(True)
    output = RDPO(Config()).loss(logp_T, replace(micro, weight_P=grid([1 / 3, 1 / 3, 0.0])))
    close(output.loss, sum(GOLDEN["rdpo_beta0.1_alpha0.001"]["losses"][:2]) / 3)
    assert output.metrics["rewards/accuracies"] == (1, 2)
