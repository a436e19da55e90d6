"""Whether pool and trainer agree on what the pool sampled: the gap between their log-probs, and an alarm on it."""

import torch

from rto_megatron.algorithms.pool_importance import pool_log_ratio
from rto_megatron.parallel.topology import Topology
from rto_megatron.trainer.report.progress import say
from rto_megatron.types import ScoredRollouts


def watched_gap(
    scored: ScoredRollouts, topology: Topology, threshold: float | None, step: int
) -> dict[str, float]:
    """`pool_gap` and `gap_alarm` together; all ranks must call this."""
    gap = pool_gap(scored, topology)
    return gap | gap_alarm(gap, threshold, step, topology.is_lead)


def pool_gap(scored: ScoredRollouts, topology: Topology) -> dict[str, float]:
    """Mean and largest difference between the pool's log-probs and ours over all replicas; all ranks must call this.

    In nats, over the tokens that the pool sampled; 0 where there are none.
    """
    gap_BR = pool_log_ratio(scored).abs().double()
    own = torch.stack([gap_BR.sum(), scored.sampled_BR.sum().double()])
    total, count = topology.dp_sum(own).tolist()
    everywhere = [float(str(value)) for value in topology.gather_json(float(gap_BR.max()))]
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
