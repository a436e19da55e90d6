"""What gives responses their rewards: a reward model on the ranks, the length of a response, or something outside."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from rto_megatron.algorithms.reward_shaping import overlong_punishment
from rto_megatron.algorithms.termination import TruncationPolicy, close_response
from rto_megatron.data.cut import CutSequences, Layout
from rto_megatron.data.packing import padded_rows, sequence_batches
from rto_megatron.data.sample_reader import SampleReader
from rto_megatron.engine.absent import FrozenRole
from rto_megatron.errors import UserError
from rto_megatron.parallel.dealing import Share, shared_out
from rto_megatron.parallel.topology import Topology
from rto_megatron.rewards.sample import Given, Rater
from rto_megatron.rewards.service import RewardServiceLost
from rto_megatron.trainer.role_shares import packed_for
from rto_megatron.types import EndOfSequence, Rollout


class RewardSource(Protocol):
    """Rates responses; the token rewards of the method come beside it.

    Example:
        scores_B = reward.scores(rollouts)
    """

    def scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Rates the responses of this replica; all ranks must call it, those of a replica with the same rollouts.

        Args:
            rollouts: closed by the truncation policy, in the order of the prompts.

        Returns:
            float32 on the trainer's device, the same on every rank of the replica: [B] where it pays responses,
            [B, R] where it pays tokens, 0 behind the end of a response. A number that is NaN or infinite is refused
            by whoever asked, with its prompt.
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

    model: FrozenRole
    layout: Layout
    eos: EndOfSequence
    policy: TruncationPolicy

    def scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        """See `RewardSource.scores`."""
        return self.begin(shared_out(list(rollouts), list[Rollout], self.model.topology))()

    def begin(self, share: Share[Rollout]) -> Callable[[], Tensor]:
        """Makes the model's forward, where this rank holds it.

        Args:
            share: of the rollouts, for the layout of the model.

        Returns:
            what all ranks call then, and what gives the scores; see `scores`.
        """
        sequences = []
        for rollout in share.items:
            _, appended = close_response(rollout.response_ids, rollout.finish_reason, self.eos, self.policy)
            ids = (*rollout.prompt_ids, *rollout.response_ids, *appended)
            sequences.append((ids, len(rollout.prompt_ids)))
        cut = sequence_batches(sequences, packed_for(self.model.topology, self.layout))
        return partial(self._told, self.model.begin_outputs(cut.batches), cut, share)

    def _told(self, outputs: Callable[[], list[Tensor]], cut: CutSequences, share: Share[Rollout]) -> Tensor:
        ends = [v[list(b.last_positions)] for v, b in zip(outputs(), cut.batches, strict=True)]
        return share.back(cut.in_order(ends))


@dataclass(frozen=True)
class OverlongReward:
    """DAPO's soft punishment of long responses, see `overlong_punishment`.

    Example:
        OverlongReward(max_tokens=1024, buffer_tokens=256, device=torch.device("cpu")).scores(rollouts)
    """

    max_tokens: int
    buffer_tokens: int
    device: torch.device

    def scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        """See `RewardSource.scores`."""
        lengths = [float(len(rollout.response_ids)) for rollout in rollouts]
        return overlong_punishment(
            torch.tensor(lengths, device=self.device), self.max_tokens, self.buffer_tokens
        )


class OutsideReward:
    """A rater that one rank of each replica asks; the others receive what it gave.

    Args:
        make: starts the rater; called on replica leads.
        read: makes samples of rollouts.
        pays_tokens: whether the rater gives a number for every token.

    Raises:
        UserError: on every rank, when a rater cannot be started.

    Example:
        OutsideReward(lambda: rater, reader, topology, pays_tokens=False).scores(rollouts)
    """

    def __init__(
        self, make: Callable[[], Rater], read: "SampleReader", topology: Topology, pays_tokens: bool
    ) -> None:
        self._read = read
        self._topology = topology
        self._pays_tokens = pays_tokens
        self._rater: Rater | None = None
        failure = None
        try:
            self._rater = make() if topology.is_replica_lead else None
        except UserError as raised:
            failure = raised
        topology.raise_together(failure)

    def scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        """See `RewardSource.scores`.

        Raises:
            UserError: on every rank, when the rater of any replica failed.
        """
        given: list[Given] = []
        failure = None
        if self._rater is not None:
            try:
                given = self._rater.rate([self._read.sample(rollout) for rollout in rollouts])
            except UserError as raised:
                failure = raised
        self._topology.raise_together(failure, RewardServiceLost)
        own = [[one] if isinstance(one, float) else one for one in given]
        rows = self._topology.replica_value(own, list[list[float]])
        grid = padded_rows(rows, self._topology.device.torch_device)
        return grid if self._pays_tokens else grid[:, 0]
