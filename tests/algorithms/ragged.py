"""Random scored rollouts of unequal lengths in float64, with garbage behind their ends, as micro-batches too."""

from collections.abc import Sequence

import torch
from algorithms.grids import grid
from torch import Tensor

from rto_megatron.algorithms.losses import weighting_of
from rto_megatron.data.packing import Layout, minibatches
from rto_megatron.types import Experience, Minibatch, Rollout, ScoredRollouts

DELIMITER = 5
LONGEST = 9  # tokens that a response may have
CPU = torch.device("cpu")


def scored_rollouts(
    count: int, seed: int = 0, padding: float = 1e30, cut: Sequence[int] = ()
) -> ScoredRollouts:
    """Responses of 1 to 7 tokens; `cut` are the rows that the length limit ended, and their last token is not sampled.

    Args:
        padding: what every grid holds behind the ends of the responses, and half of it in place of a log-prob of the
            pool where it sampled nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + (3 * row + seed) % 7 for row in range(count)]
    prompt_lengths = [1 + (5 * row + 2) % 4 for row in range(count)]
    mask_BR = grid([[float(t < length) for t in range(max(lengths))] for length in lengths])
    rollouts = []
    for row, (length, prompt_length) in enumerate(zip(lengths, prompt_lengths, strict=True)):
        ids = torch.randint(3, 9, (length,), generator=generator).tolist()
        prompt = (100 + row, *range(20, 19 + prompt_length))
        reason = "length" if row in cut else "stop"
        rollouts.append(Rollout(f"p{row}", prompt, tuple(ids), (0.0,) * length, reason, 0))

    def noise(sign: float) -> Tensor:
        drawn_BR = torch.randn(mask_BR.shape, generator=generator, dtype=torch.float64)
        return torch.where(mask_BR != 0, drawn_BR, torch.full_like(drawn_BR, sign * padding))

    logp_old_BR = noise(-1)
    gap_BR = torch.randn(
        mask_BR.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    sampled_BR = mask_BR.clone()
    sampled_BR[list(cut), [lengths[row] - 1 for row in cut]] = 0.0
    return ScoredRollouts(
        rollouts=tuple(rollouts),
        mask_BR=mask_BR,
        sampled_BR=sampled_BR,
        logp_pool_BR=torch.where(
            sampled_BR != 0, logp_old_BR + gap_BR, torch.full_like(gap_BR, -padding / 2)
        ),
        logp_old_BR=logp_old_BR,
        logp_ref_BR=noise(1),
        dpo_logratio_BR=noise(-1),
        values_BR=noise(1),
        bootstrap_B=torch.zeros(count, dtype=torch.float64),
        score_B=torch.randn(count, generator=generator, dtype=torch.float64),
    )


def step_minibatches(
    experience: Experience,
    weighting: str,
    rows: Sequence[int],
    micro: int,
    packed: bool,
    multiple_of: int = 1,
) -> list[Minibatch]:
    """The micro-batches of one optimizer step on `rows`; the weights are those of a step on all rows."""
    rule = weighting_of(weighting, LONGEST)
    mask_BR = experience.mask_BR
    weights_BR = rule.weights(mask_BR, float(rule.count(mask_BR)))
    return minibatches(experience, weights_BR, rows, Layout(micro, packed, multiple_of, CPU))
