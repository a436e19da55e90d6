"""All sources of a run's rewards together: each asked, wrapped in what changes its numbers, weighed, then added."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rto_megatron.algorithms.reward_shaping import (
    normalized_in_batch,
    normalized_in_group,
    tokens_normalized_in_batch,
    tokens_normalized_in_group,
)
from rto_megatron.data.packing import response_mask
from rto_megatron.parallel.topology import Topology
from rto_megatron.trainer.reward_source import ModelReward, OverlongReward, RewardSource
from rto_megatron.types import Rewards, Rollout


@dataclass(frozen=True)
class Term:
    """One source, and what is done to its numbers: punished for length first, then normalised, clipped and weighed.

    Args:
        clip: bound of the absolute value; None: none.
        overlong: what a response loses for its length, on its last token where the source pays tokens; None: nothing.

    Example:
        Term("exact", source, weight=0.5, normalize="group")
    """

    name: str
    source: RewardSource
    weight: float = 1.0
    normalize: Literal["group", "batch"] | None = None
    clip: float | None = None
    overlong: OverlongReward | None = None


@dataclass(frozen=True)
class RewardSum:
    """What pays the responses of a run.

    Args:
        group_size: responses to a prompt, which stand side by side.
        is_told_apart: whether the parts of each source are kept for the logs.

    Example:
        RewardSum((Term("exact", source),), group_size=8, topology=topology).rate(rollouts).score_B
    """

    terms: tuple[Term, ...]
    group_size: int
    topology: Topology
    is_told_apart: bool = True

    def models(self) -> dict[str, ModelReward]:
        """The sources that are models of the ranks: what they say of a response, the others do not change."""
        return {term.name: term.source for term in self.terms if isinstance(term.source, ModelReward)}

    def rate(self, rollouts: Sequence[Rollout], known: Mapping[str, Tensor] | None = None) -> Rewards:
        """Asks every source; all ranks must call it.

        Args:
            known: what sources said of these rollouts already, by name.

        Raises:
            UserError: on every rank, when a source failed on any.
        """
        scores: list[Tensor] = []
        tokens: list[Tensor] = []
        given, paid = {}, {}
        for term in self.terms:
            raw = (known or {}).get(term.name)
            raw = term.source.scores(rollouts) if raw is None else raw
            shaped = self._shaped(raw, term, rollouts)
            (scores if raw.ndim == 1 else tokens).append(shaped)
            given[term.name], paid[term.name] = (x if x.ndim == 1 else x.sum(1) for x in (raw, shaped))
        nothing_B = torch.zeros(len(rollouts), device=self.topology.device.torch_device)
        return Rewards(
            score_B=_sum(scores) if scores else nothing_B,
            source_BR=_sum(tokens) if tokens else None,
            given=given if self.is_told_apart else {},
            paid=paid if self.is_told_apart else {},
        )

    def unnormalized(self) -> "RewardSum":
        """The same sources and weights for responses of no training step, which make no group or batch of one."""
        return replace(self, terms=tuple(replace(term, normalize=None) for term in self.terms))

    def _shaped(self, raw: Tensor, term: Term, rollouts: Sequence[Rollout]) -> Tensor:
        shaped = raw
        if term.overlong is not None:
            punished_B = term.overlong.scores(rollouts)
            shaped = raw + (punished_B if raw.ndim == 1 else _on_last_tokens(punished_B, rollouts, raw))
        if term.normalize is not None:
            shaped = self._normalized(shaped, term.normalize, rollouts)
        if term.clip is not None:
            shaped = shaped.clamp(-term.clip, term.clip)
        return term.weight * shaped

    def _normalized(
        self, raw: Tensor, over: Literal["group", "batch"], rollouts: Sequence[Rollout]
    ) -> Tensor:
        if raw.ndim == 1:
            if over == "group":
                return normalized_in_group(raw, self.group_size)
            return normalized_in_batch(raw, self.topology.dp_sum)
        mask_BR = response_mask(rollouts, raw.device)
        if over == "group":
            return tokens_normalized_in_group(raw, mask_BR, self.group_size)
        return tokens_normalized_in_batch(raw, mask_BR, self.topology.dp_sum)


def alone(source: RewardSource, topology: Topology) -> RewardSum:
    """One source, paid as it is."""
    return RewardSum((Term("reward", source),), 1, topology, is_told_apart=False)


def _on_last_tokens(value_B: Tensor, rollouts: Sequence[Rollout], like_BR: Tensor) -> Tensor:
    last_B = torch.tensor([len(rollout.response_ids) - 1 for rollout in rollouts], device=like_BR.device)
    return torch.zeros_like(like_BR).scatter(1, last_B[:, None], value_B[:, None])


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total, *others = parts
    for one in others:
        total = total + one
    return total
