"""Golden [2, 6] grids as the types that losses take: float64, packed or padded, garbage in the padding."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from rto_megatron.types import Minibatch, Rollout, ScoredRollouts, TokenBatch

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())
PROMPT_LENGTH = 3
GARBAGE = 1e30
RESPONSE_LENGTHS = (5, 3)  # of the golden masks


def close(actual: Tensor | float, expected: object) -> None:
    """Equal to 1e-9 relative, in float64."""
    actual_64 = torch.as_tensor(actual)
    assert actual_64.dtype == torch.float64
    torch.testing.assert_close(actual_64, grid(expected), rtol=1e-9, atol=1e-12)


def grid(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def no_reduction(x: Tensor) -> Tensor:
    """`all_sum` of a single rank."""
    return x


def no_vocabulary(strings: Iterable[str]) -> frozenset[int]:
    """A vocabulary in which only token 9 holds what is asked for: the token that `rollouts` never samples."""
    return frozenset({9})


def ragged_batch(lengths: tuple[int, ...], packed: bool) -> TokenBatch:
    """Sequences of the given lengths; two positions of padding behind them, in every row when padded."""
    width = max(lengths) + 2
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + (length if packed else width))
    last = tuple(start + length - 1 for start, length in zip(offsets, lengths, strict=False))
    if packed:
        offsets.append(offsets[-1] + 2)
    ids = torch.zeros(offsets[-1], dtype=torch.int64)
    return TokenBatch(
        ids, ids, tuple(offsets), 1 if packed else len(lengths), last, 0, torch.arange(len(ids))
    )


def to_positions(grid_BR: Tensor, batch: TokenBatch, prompt_length: int, padding: float) -> Tensor:
    """Puts the valid part of each row on the positions that predict it, `padding` everywhere else."""
    positions_T = torch.full((batch.cu_seqlens[-1],), padding, dtype=grid_BR.dtype)
    for row, start, last in zip(grid_BR, batch.cu_seqlens, batch.last_positions, strict=False):
        first = start + prompt_length - 1
        positions_T[first:last] = row[: last - first]
    return positions_T


def to_grid(values_T: Tensor, batch: TokenBatch, prompt_length: int, width: int) -> Tensor:
    """The inverse of `to_positions`, 0 behind the end of each row."""
    grid_BR = torch.zeros(len(batch.last_positions), width, dtype=values_T.dtype)
    for row, start, last in zip(grid_BR, batch.cu_seqlens, batch.last_positions, strict=False):
        first = start + prompt_length - 1
        row[: last - first] = values_T[first:last]
    return grid_BR


def ppo_minibatch(weight_BR: Tensor, packed: bool, padding: float = GARBAGE) -> Minibatch:
    """The golden PPO inputs; policy and value fields are those of the same rollouts."""
    policy, value = GOLDEN["ppo_policy_inputs"], GOLDEN["ppo_value_inputs"]
    batch = ragged_batch(tuple(PROMPT_LENGTH + length for length in RESPONSE_LENGTHS), packed)

    def spread(values: object, sign: float = 1.0) -> Tensor:
        return to_positions(grid(values), batch, PROMPT_LENGTH, sign * padding)

    return Minibatch(
        batch=batch,
        weight_T=to_positions(weight_BR, batch, PROMPT_LENGTH, 0.0),
        logp_old_T=spread(policy["old_logp"]),
        logp_ref_T=spread(GOLDEN["rto_reward_inputs"]["logp_ref"]),
        pool_importance_T=spread([[1.0] * 6] * 2),
        advantages_T=spread(GOLDEN["advantage_normalization"]["normalized"]),
        values_old_T=spread(value["old_values"]),
        returns_T=spread(GOLDEN["gae_gamma1_lambda0.95"]["returns"], sign=-0.5),
    )


def rollouts(finish_reasons: tuple[str, ...]) -> tuple[Rollout, ...]:
    return tuple(
        Rollout(f"p{i}", (1, 2, 3), (4,) * length, (0.0,) * length, reason, 0)
        for i, (length, reason) in enumerate(zip(RESPONSE_LENGTHS, finish_reasons, strict=True))
    )


def golden_scored(finish_reasons: tuple[str, ...] = ("stop", "stop")) -> ScoredRollouts:
    """The worked example: two responses, the golden values of the GAE example as the critic's."""
    inputs = GOLDEN["rto_reward_inputs"]
    raw_B = grid(inputs["raw_rm_reward"])
    return ScoredRollouts(
        rollouts=rollouts(finish_reasons),
        mask_BR=grid(inputs["action_mask"]),
        sampled_BR=grid(inputs["action_mask"]),
        logp_pool_BR=grid(inputs["logp_policy"]),
        logp_old_BR=grid(inputs["logp_policy"]),
        logp_ref_BR=grid(inputs["logp_ref"]),
        dpo_logratio_BR=grid(inputs["logp_dpo"]) - grid(inputs["logp_ref"]),
        values_BR=grid(GOLDEN["gae_inputs"]["values"]),
        bootstrap_B=grid([0.0, 0.0]),
        score_B=(raw_B - inputs["rm_mean"]) / inputs["rm_std"],
    )
