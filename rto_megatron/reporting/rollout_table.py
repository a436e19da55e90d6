"""The rollouts of a step as a table: a row for each response, and a column for everything that was said of it.

Columns that start with `token/` hold a list with a number for each response token. README of the columns: docs/look.md.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from rto_megatron.data.token_text import Decode, TokenText
from rto_megatron.types import Experience, Rollout, ScoredRollouts

TOKEN = "token/"  # what the names of columns with a number for each token start with
SOURCE = "source/"  # what the names of columns with what a source of rewards gave start with
PAID = "paid/"  # and of those with what of it entered the reward


@dataclass(frozen=True)
class StepRollouts:
    """Everything known of the responses of one replica in one step, on the CPU.

    Example:
        gathered(12, scored, experience).tokens["advantage"].shape
    """

    step: int  # counted from 1, as in metrics.jsonl
    rollouts: tuple[Rollout, ...]
    responses: Mapping[str, NDArray[np.float32]]  # column -> [B]
    tokens: Mapping[str, NDArray[np.float32]]  # column without `token/` -> [B, R]


def gathered(step: int, scored: ScoredRollouts, experience: Experience) -> StepRollouts:
    """Brings the numbers of a step to the CPU."""
    rewards = experience.rewards
    total_BR = rewards.total_BR()
    tokens = {
        "sampled": scored.sampled_BR,
        "logp_pool": scored.logp_pool_BR,
        "logp_policy": scored.logp_old_BR,
        "logp_ref": scored.logp_ref_BR,
        "dpo_logratio": scored.dpo_logratio_BR,
        "value": scored.values_BR,
        "reward": total_BR,
        "reward_score": rewards.score_BR,
        "reward_dpo": rewards.dpo_BR,
        "reward_kl": rewards.kl_BR,
        "advantage": experience.advantages_BR,
        "return": experience.returns_BR,
    }
    if rewards.source_BR is not None:
        tokens["reward_source"] = rewards.source_BR
    responses = {
        "score": scored.score_B,
        "reward": (total_BR * scored.mask_BR).sum(dim=1),
        **{SOURCE + name: given_B for name, given_B in scored.scores_by_source.items()},
        **{PAID + name: paid_B for name, paid_B in scored.paid_by_source.items()},
    }
    return StepRollouts(
        step,
        experience.rollouts,
        {name: _numbers(tensor) for name, tensor in responses.items()},
        {name: _numbers(tensor) for name, tensor in tokens.items()},
    )


def _numbers(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array


def rollout_table(kept: StepRollouts, decode: Decode, text: TokenText) -> pa.Table:
    """The rows of one replica, in the order in which they were sampled.

    Args:
        decode: token ids -> text, special tokens included.
        text: of single tokens.
    """
    rollouts = kept.rollouts
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts])
    width = int(lengths.max())
    is_token_BR = np.arange(width) < lengths[:, None]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    columns: dict[str, pa.Array] = {
        "step": pa.array([kept.step] * len(rollouts), pa.int32()),
        "prompt_id": pa.array([rollout.prompt_id for rollout in rollouts]),
        "sample": pa.array(_samples(rollouts), pa.int32()),
        "prompt": pa.array([decode(rollout.prompt_ids) for rollout in rollouts]),
        "response": pa.array([decode(rollout.response_ids) for rollout in rollouts]),
        "finish_reason": pa.array([rollout.finish_reason for rollout in rollouts]),
        "num_tokens": pa.array(lengths, pa.int32()),
        "version": pa.array([rollout.weight_version for rollout in rollouts], pa.int32()),
        "age": pa.array([kept.step - 1 - rollout.weight_version for rollout in rollouts], pa.int32()),
        **{name: pa.array(values_B) for name, values_B in kept.responses.items()},
        "prompt_ids": pa.array([rollout.prompt_ids for rollout in rollouts], pa.list_(pa.int32())),
        "response_ids": pa.array([rollout.response_ids for rollout in rollouts], pa.list_(pa.int32())),
        "pieces": pa.array(
            [[text(token) for token in r.response_ids] for r in rollouts], pa.list_(pa.string())
        ),
    }
    for name, grid_BR in kept.tokens.items():
        flat = pa.array(grid_BR[:, :width][is_token_BR])
        columns[TOKEN + name] = pa.ListArray.from_arrays(pa.array(offsets), flat)
    return pa.table(columns)


def _samples(rollouts: Sequence[Rollout]) -> list[int]:
    """Of each response, how many to the same prompt stand before it."""
    seen: Counter[str] = Counter()
    places = []
    for rollout in rollouts:
        places.append(seen[rollout.prompt_id])
        seen[rollout.prompt_id] += 1
    return places
