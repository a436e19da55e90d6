"""Which rollouts are refused before credit assignment, and for what."""

import math
from dataclasses import replace

import pytest
import torch
from algorithms.ragged import scored_rollouts

from rto_megatron.trainer.checked_scores import broken_scores
from rto_megatron.types import ScoredRollouts, TrainerSample

ROWS = 4
_PLAIN = scored_rollouts(ROWS)
SCORED = replace(
    _PLAIN,
    by_trainer=TrainerSample(torch.zeros_like(_PLAIN.mask_BR), torch.tensor([True, False, False, True])),
    scores_by_source={"exact": torch.zeros(ROWS)},
)
GRIDS = {
    "logp_pool_BR": "log-prob of the pool",
    "logp_old_BR": "log-prob of the policy",
    "logp_ref_BR": "log-prob of the reference",
    "dpo_logratio_BR": "log-ratio of the DPO model",
    "values_BR": "value of the critic",
    "bootstrap_B": "value of the critic behind a cut response",
    "score_B": "sum of the rewards",
}


def _poisoned(scored: ScoredRollouts, name: str, number: float) -> ScoredRollouts:
    grid = getattr(scored, name).clone()
    grid.view(ROWS, -1)[2, 0] = number
    return replace(scored, **{name: grid})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", GRIDS)
def test_a_number_that_is_not_finite_names_its_prompt(name: str, number: float) -> None:
    assert broken_scores(SCORED, 1000.0) == {}
    found = broken_scores(_poisoned(SCORED, name, number), 1000.0)
    assert found == {f"a {GRIDS[name]} is NaN or infinite": ["p2"]}


def test_what_one_source_and_the_trainers_own_policy_say_is_looked_at() -> None:
    given = replace(SCORED, scores_by_source={"exact": torch.tensor([0.0, math.nan, 0.0, 0.0])})
    assert broken_scores(given, None) == {"a score of rewards.exact is NaN or infinite": ["p1"]}
    assert SCORED.by_trainer is not None
    logp_BR = SCORED.by_trainer.logp_BR.clone()
    logp_BR[3, 0] = math.inf
    own = replace(SCORED, by_trainer=replace(SCORED.by_trainer, logp_BR=logp_BR))
    assert broken_scores(own, None) == {
        "a log-prob of the policy by the trainer is NaN or infinite": ["p3"],
    }


def test_a_score_beyond_the_limit_is_none_and_one_at_it_is() -> None:
    far = replace(SCORED, score_B=torch.tensor([10.0, -10.0, 10.5, -10.5]))
    assert broken_scores(far, 10.0) == {
        "a sum of the rewards is beyond algorithm.score_limit=10": ["p2", "p3"],
    }
    assert broken_scores(far, None) == {}
    alone = replace(far, scores_by_source={})
    assert list(broken_scores(alone, 10.0)) == [
        "a score of the reward model is beyond algorithm.score_limit=10",
    ]
