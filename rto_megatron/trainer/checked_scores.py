"""Scored rollouts that may be trained on: broken responses and numbers are refused, the gap to the pool is watched."""

import time
from collections.abc import Mapping, Sequence

import torch

from rto_megatron.algorithms.pool_importance import compared_tokens, pool_log_ratio
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.engine.finite import refuse_together
from rto_megatron.parallel.topology import Topology
from rto_megatron.reporting.progress import say
from rto_megatron.trainer.arrivals import Hear
from rto_megatron.trainer.opinions import Group, Opinion, Roles, opinions
from rto_megatron.trainer.scoring import close_rollouts, drawn_from, score
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import EndOfSequence, Metrics, Rollout, ScoredRollouts

Found = Mapping[str, Sequence[str]]  # what is wrong -> ids of the prompts


def broken_rollouts(rollouts: Sequence[Rollout], eos: EndOfSequence, has_stops: bool = False) -> Found:
    """Responses without a token, and those that claim to have ended without end-of-sequence.

    Args:
        has_stops: a response may end with a text as well.
    """
    empty = [r.prompt_id for r in rollouts if not r.response_ids]
    unended = [
        r.prompt_id
        for r in rollouts
        if not has_stops
        and r.response_ids
        and r.finish_reason == "stop"
        and r.response_ids[-1] not in eos.ids
    ]
    found = {"a response has no token": empty, "a finished response has no end-of-sequence": unended}
    return {what: ids for what, ids in found.items() if ids}


def broken_scores(scored: ScoredRollouts, score_limit: float | None) -> Found:
    """Numbers that are NaN or infinite, and scores beyond the limit.

    To be asked before credit assignment: whitening spreads one NaN over all samples, and clamping hides a score.

    Args:
        score_limit: bound of the absolute value of a normalised score; None: any finite one.
    """
    found, sample = {}, scored.by_trainer
    whose = "sum of the rewards" if scored.scores_by_source else "score of the reward model"
    for what, values in (
        *(
            (f"score of rewards.{name}", given_B[:, None])
            for name, given_B in scored.scores_by_source.items()
        ),
        (whose, scored.score_B[:, None]),
        ("log-prob of the pool", scored.logp_pool_BR),
        ("log-prob of the policy", scored.logp_old_BR),
        *([] if sample is None else [("log-prob of the policy by the trainer", sample.logp_BR)]),
        ("log-prob of the reference", scored.logp_ref_BR),
        ("log-ratio of the DPO model", scored.dpo_logratio_BR),
        ("value of the critic", scored.values_BR),
        ("value of the critic behind a cut response", scored.bootstrap_B[:, None]),
    ):
        found[f"a {what} is NaN or infinite"] = ~torch.isfinite(values).all(1)
    if score_limit is not None:
        beyond_B = torch.isfinite(scored.score_B) & (scored.score_B.abs() > score_limit)
        found[f"a {whose} is beyond algorithm.score_limit={score_limit:g}"] = beyond_B
    is_bad_KB = torch.stack(list(found.values())).tolist()  # one transfer from the device
    named = {
        what: [rollout.prompt_id for rollout, bad in zip(scored.rollouts, row, strict=True) if bad]
        for what, row in zip(found, is_bad_KB, strict=True)
    }
    return {what: ids for what, ids in named.items() if ids}


class Scorer:
    """Scores sampled responses, and refuses what must not be trained on.

    Example:
        scored = Scorer(config, setup, roles).score(sampled, step=3)
    """

    def __init__(self, config: ReinforcementStage, setup: Setup, roles: Roles) -> None:
        self._config = config
        self._setup = setup
        self._roles = roles
        self._early: dict[Group, Opinion] = {}  # of the step's responses, until it is scored
        self._seconds = 0.0  # that they took, since they were last told

    @property
    def ear(self) -> Hear | None:
        """What asks of responses that are there early; None where all of a batch decide who shares a micro-batch, or a
        model needs all ranks at once: with a layout of its own, or as a mixture whose replicas exchange tokens."""
        setup, place = self._setup, self._setup.topology
        is_alone = setup.layout.tokens is None and place.is_layout_of_all and not place.is_exchanging
        return self.hear if is_alone else None

    def hear(self, sampled: Sequence[Rollout]) -> None:
        """Asks the models of responses of the next step before the others are there, see `Hear`.

        Numbers are those of `score`, which asks of whole micro-batches too, and not again of these.
        """
        start = time.monotonic()
        config, setup = self._config, self._setup
        self._roles.memory.enter("score")
        how = config.sampling
        if not broken_rollouts(sampled, setup.eos, bool(how.stop)):  # `score` refuses those, with all others
            closed = close_rollouts(sampled, setup.eos, config.algorithm.truncated)
            drawn = drawn_from(setup.eos, how)
            asks_policy = config.rollout.old_logprobs == "trainer"
            self._early |= opinions(closed, self._roles, setup.layout, drawn, asks_policy)
        self._seconds += time.monotonic() - start

    def measured(self) -> Metrics:
        """Sums for the logs: for how long models were asked before all responses were there."""
        seconds, self._seconds = self._seconds, 0.0
        return {"time/score_early_s": (seconds, 1.0)}

    def score(self, sampled: Sequence[Rollout], step: int) -> ScoredRollouts:
        """Every model's opinion of rollouts that may be trained on; all ranks must call it.

        Args:
            step: counted from 1.

        Raises:
            PoisonedError: on every rank, when a response or a number of any rank is broken; names the prompts.
        """
        topology = self._setup.topology
        has_stops = bool(self._config.sampling.stop)
        try:
            refuse_together(broken_rollouts(sampled, self._setup.eos, has_stops), topology)
            scored = self.opinions(sampled, step)
        finally:
            self._early = {}
        refuse_together(broken_scores(scored, self._config.algorithm.score_limit), topology)
        return scored

    def opinions(self, sampled: Sequence[Rollout], step: int) -> ScoredRollouts:
        """What the models say, whatever it is; all ranks must call it."""
        config, setup = self._config, self._setup
        truncated = config.algorithm.truncated
        return score(
            sampled, self._roles, setup.layout, setup.eos, truncated, config.sampling, self._early,
            config.rollout.old_logprobs,
        )  # fmt: skip


def watched_gap(
    scored: ScoredRollouts, topology: Topology, threshold: float | None, step: int
) -> dict[str, float]:
    """`pool_gap`, and `gap_alarm` where the step's own weights sampled; all ranks must call this.

    With older weights what the policy learnt since then is in the gap, and the push's canary alone speaks for the pool.

    Args:
        step: counted from 1.
    """
    gap = pool_gap(scored, topology)
    if topology.any(any(rollout.weight_version != step - 1 for rollout in scored.rollouts)):
        return gap
    return gap | gap_alarm(gap, threshold, step, topology.is_lead)


def pool_gap(scored: ScoredRollouts, topology: Topology) -> dict[str, float]:
    """Mean and largest difference between the pool's log-probs and ours over all replicas; all ranks must call this.

    In nats, over the tokens that the pool sampled and the trainer's policy was asked of; 0 where there are none.
    """
    gap_BR = pool_log_ratio(scored).abs().double()
    own = torch.stack([gap_BR.sum(), compared_tokens(scored).sum().double()])
    total, count = topology.dp_sum(own).tolist()
    everywhere = topology.gather(float(gap_BR.max()), float)
    return {"pool/logprob_gap_mean": total / max(count, 1), "pool/logprob_gap_max": max(everywhere)}


def gap_alarm(gap: dict[str, float], threshold: float | None, step: int, is_lead: bool) -> dict[str, float]:
    """Says on the lead that the mean gap is above `threshold`; 1 where it is, else 0.

    Args:
        gap: what `pool_gap` gave.
        threshold: nats; None: nothing is watched, and there is no metric.
    """
    if threshold is None:
        return {}
    mean, largest = gap["pool/logprob_gap_mean"], gap["pool/logprob_gap_max"]
    is_above = mean > threshold
    say(
        f"warning: step {step}: the log-probs of pool and trainer differ by {mean:.2g} nats in the mean and "
        f"{largest:.2g} at most, above rollout.logprob_gap_alarm={threshold:g}; compare precision.dtype with the "
        "pool's dtype, quantization and cache dtype, and its config.json with the policy's (docs/methods.md)",
        is_lead and is_above,
    )
    return {"pool/logprob_gap_alarm": float(is_above)}
