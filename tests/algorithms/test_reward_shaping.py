"""What is done to the numbers of a source before they are added, against the published forms."""

from dataclasses import replace

import pytest
import torch
from algorithms.grids import no_reduction, no_vocabulary
from algorithms.ragged import scored_rollouts
from trl.rewards import get_soft_overlong_punishment

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.losses import keep
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.algorithms.reward_shaping import (
    normalized_in_batch,
    normalized_in_group,
    overlong_punishment,
)

SCORES = torch.tensor([0.5, 2.0, -1.0, 0.25, 3.0, 3.0, 3.0, 3.0])


def test_the_overlong_punishment_is_equation_13_of_dapo() -> None:
    for max_tokens, buffer_tokens in ((100, 20), (8, 8), (20, 1)):
        lengths = list(range(1, max_tokens + 3))
        published = get_soft_overlong_punishment(max_tokens, buffer_tokens)(
            [[0] * length for length in lengths]
        )
        ours = overlong_punishment(torch.tensor(lengths, dtype=torch.float32), max_tokens, buffer_tokens)
        torch.testing.assert_close(ours, torch.tensor(published))
    # By hand: L_max 100, L_cache 20, 90 tokens: ((100 - 20) - 90) / 20.
    assert float(overlong_punishment(torch.tensor([90.0]), 100, 20)) == pytest.approx(-0.5)


def test_a_group_is_normalised_as_gdpo_and_trl_do_each_reward() -> None:
    # TRL, trainer/grpo_trainer.py, multi_objective_aggregation="normalize_then_sum", written out.
    grouped = SCORES.view(-1, 4)
    wanted = ((grouped - grouped.nanmean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    torch.testing.assert_close(normalized_in_group(SCORES, 4), wanted)
    assert normalized_in_group(SCORES, 4)[4:].tolist() == [0.0] * 4  # equal scores teach nothing


def test_a_batch_is_normalised_over_all_replicas() -> None:
    wanted = (SCORES - SCORES.mean()) / (SCORES.std() + 1e-4)
    torch.testing.assert_close(normalized_in_batch(SCORES, lambda x: x), wanted)
    # Two replicas by hand: each sees the sums of both.
    first, second = SCORES[:3].double(), SCORES[3:].double()
    sums = [
        torch.stack([SCORES.double().sum(), torch.tensor(8.0, dtype=torch.float64)]),
        (SCORES.double() - SCORES.double().mean()).square().sum(),
    ]
    for own, part in ((first, wanted[:3]), (second, wanted[3:])):
        answers = iter(sums)
        torch.testing.assert_close(normalized_in_batch(own.float(), lambda _, a=answers: next(a)), part)
    assert normalized_in_batch(torch.tensor([2.0]), lambda x: x).tolist() == [0.0]


@pytest.mark.parametrize("name", [name for name, one in ALGORITHMS.items() if isinstance(one, OnlineMethod)])
def test_sources_that_pay_tokens_enter_the_return_of_every_method(name: str) -> None:
    method = ALGORITHMS[name]
    assert isinstance(method, OnlineMethod)
    scored = scored_rollouts(16, seed=2, cut=(2, 5))
    source_BR = keep(torch.randn(scored.mask_BR.shape, dtype=torch.float64), scored.mask_BR)
    keys = {"lam": 1.0} if "lam" in method.config.model_fields else {}
    algorithm = method.build(method.config(**keys), no_vocabulary)
    without = algorithm.credit(scored, 0.1, no_reduction)
    paid = algorithm.credit(replace(scored, source_BR=source_BR), 0.1, no_reduction)
    # At gamma and lambda 1 the return of the first token is the sum of what follows.
    difference_B = paid.returns_BR[:, 0] - without.returns_BR[:, 0]
    torch.testing.assert_close(difference_B, torch.stack([row.sum() for row in source_BR]))
    assert not torch.allclose(paid.advantages_BR, without.advantages_BR)
