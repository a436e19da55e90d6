"""What a rollout step must not be trained on: broken responses, and numbers of the models that cannot be meant."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.engine.finite import refuse_together
from rto_megatron.platform import faults
from rto_megatron.trainer.rollouts import Roles, score
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import EndOfSequence, Rollout, ScoredRollouts

Found = Mapping[str, Sequence[str]]  # what is wrong -> ids of the prompts


def broken_rollouts(rollouts: Sequence[Rollout], eos: EndOfSequence) -> Found:
    """Responses without a token, and those that claim to have ended without end-of-sequence."""
    empty = [r.prompt_id for r in rollouts if not r.response_ids]
    unended = [
        r.prompt_id
        for r in rollouts
        if r.response_ids and r.finish_reason == "stop" and r.response_ids[-1] not in eos.ids
    ]
    found = {"a response has no token": empty, "a finished response has no end-of-sequence": unended}
    return {what: ids for what, ids in found.items() if ids}


def broken_scores(scored: ScoredRollouts, score_limit: float | None) -> Found:
    """Numbers that are NaN or infinite, and scores beyond the limit.

    To be asked before credit assignment: whitening spreads one NaN over all samples, and clamping hides a score.

    Args:
        score_limit: bound of the absolute value of a normalised score; None: any finite one.
    """
    found = {}
    for what, values in (
        ("score of the reward model", scored.score_B[:, None]),
        ("log-prob of the pool", scored.logp_pool_BR),
        ("log-prob of the policy", scored.logp_old_BR),
        ("log-prob of the reference", scored.logp_ref_BR),
        ("log-ratio of the DPO model", scored.dpo_logratio_BR),
        ("value of the critic", scored.values_BR),
        ("value of the critic behind a cut response", scored.bootstrap_B[:, None]),
    ):
        found[f"a {what} is NaN or infinite"] = ~torch.isfinite(values).all(1)
    if score_limit is not None:
        beyond_B = torch.isfinite(scored.score_B) & (scored.score_B.abs() > score_limit)
        found[f"a score of the reward model is beyond algorithm.score_limit={score_limit:g}"] = beyond_B
    is_bad_KB = torch.stack(list(found.values())).tolist()  # one transfer from the device
    named = {
        what: [rollout.prompt_id for rollout, bad in zip(scored.rollouts, row, strict=True) if bad]
        for what, row in zip(found, is_bad_KB, strict=True)
    }
    return {what: ids for what, ids in named.items() if ids}


def score_sound(
    sampled: Sequence[Rollout], roles: Roles, setup: Setup, config: ReinforcementStage, step: int
) -> ScoredRollouts:
    """`score` of rollouts that may be trained on; all ranks must call it.

    Args:
        step: counted from 1.

    Raises:
        PoisonedError: on every rank, when a response or a number of any rank is broken; names the prompts.
    """
    refuse_together(broken_rollouts(sampled, setup.eos), setup.topology)
    truncated, min_tokens = config.algorithm.truncated, config.sampling.min_response_tokens
    scored = score(sampled, roles, setup.layout, setup.eos, truncated, min_tokens)
    scored = _planted(scored, step)
    refuse_together(broken_scores(scored, config.algorithm.score_limit), setup.topology)
    return scored


def _planted(scored: ScoredRollouts, step: int) -> ScoredRollouts:
    """`scored`, or a NaN among the policy's log-probs where a fault plan wants it at this step (counted from 1)."""
    if not faults.at("logprob", step):
        return scored
    logp_old_BR = scored.logp_old_BR.clone()
    logp_old_BR[0, 0] = float("nan")
    return replace(scored, logp_old_BR=logp_old_BR)
