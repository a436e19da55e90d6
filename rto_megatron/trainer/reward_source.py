"""What gives a response its score: today the reward model; anything that scores rollouts can stand in its place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rto_megatron.algorithms.termination import TruncationPolicy, close_response
from rto_megatron.data.packing import Layout, sequence_batches
from rto_megatron.engine.megatron import FrozenModel
from rto_megatron.types import EndOfSequence, Rollout


class RewardSource(Protocol):
    """Scores whole responses; the token rewards of the method come beside it.

    Example:
        scores_B = reward.scores(rollouts)
    """

    def scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Scores the responses of this replica; every rank of the replica calls it with the same rollouts.

        Args:
            rollouts: closed by the truncation policy, in the order of the prompts.

        Returns:
            float32 [B] on the trainer's device, the same on every rank of the replica, in the units in which
            `algorithm` weighs it. A number that is NaN or infinite is refused by whoever asked, with its prompt.
        """
        ...


@dataclass(frozen=True)
class ModelReward:
    """The score of a reward model at the end of a response, less its mean and over its standard deviation.

    Args:
        policy: what became of a response that the length limit cut; its end is appended for the model to read.

    Example:
        ModelReward(model, layout, EndOfSequence((2,), 2), policy="penalise").scores(rollouts)
    """

    model: FrozenModel
    layout: Layout
    eos: EndOfSequence
    policy: TruncationPolicy

    def scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        """See `RewardSource.scores`."""
        sequences = []
        for rollout in rollouts:
            _, appended = close_response(rollout.response_ids, rollout.finish_reason, self.eos, self.policy)
            ids = (*rollout.prompt_ids, *rollout.response_ids, *appended)
            sequences.append((ids, len(rollout.prompt_ids)))
        batches = sequence_batches(sequences, self.layout)
        values = self.model.token_outputs(batches)
        return torch.cat([v[list(b.last_positions)] for v, b in zip(values, batches, strict=True)])
