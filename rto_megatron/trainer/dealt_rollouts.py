"""The rollouts of a step as the replicas of each role read them, whatever layout the role has."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rto_megatron.data.packing import Layout, rollout_batches, rollout_grid
from rto_megatron.engine.megatron import Model
from rto_megatron.parallel.dealing import Share, of_all_replicas, shared_out
from rto_megatron.parallel.topology import Topology
from rto_megatron.types import WHOLE, Distribution, Experience, Rollout, TokenBatch


def packed_for(topology: Topology, layout: Layout) -> Layout:
    """How a role's micro-batches are packed: rows are padded by its own layout."""
    return replace(layout, multiple_of=topology.row_multiple)


class DealtRollouts:
    """Rollouts of this rank's replica of the policy; all ranks must call its methods together.

    The share of a layout is made once, and read by all roles that have the layout.

    Example:
        logp_ref_BR = DealtRollouts(rollouts, layout).grid(roles.reference)
    """

    def __init__(self, rollouts: Sequence[Rollout], layout: Layout) -> None:
        self._rollouts, self._layout = list(rollouts), layout
        self._width = max(len(rollout.response_ids) for rollout in rollouts)
        self._shares: dict[Topology, Share[Rollout]] = {}
        self._batches: dict[tuple[Topology, Distribution], list[TokenBatch]] = {}

    def grid(self, model: Model, drawn: Distribution = WHOLE) -> Tensor:
        """Log-probs, or values, of the response tokens [B, R]; zeros behind a response's end.

        Args:
            drawn: what log-probs are of.
        """
        share, batches = self._dealt(model.topology, drawn)
        grid_BR = rollout_grid(model.token_outputs(batches), batches, share.items)
        return share.back(grid_BR)[:, : self._width]

    def values(self, critic: Model) -> tuple[Tensor, Tensor]:
        """Values of the states before the actions [B, R], and of the state behind each response [B]."""
        share, batches = self._dealt(critic.topology, WHOLE)
        values = critic.token_outputs(batches)
        behind_B = torch.cat([v[list(b.last_positions)] for v, b in zip(values, batches, strict=True)])
        values_BR = rollout_grid(values, batches, share.items)
        return share.back(values_BR)[:, : self._width], share.back(behind_B)

    def _dealt(self, topology: Topology, drawn: Distribution) -> tuple[Share[Rollout], list[TokenBatch]]:
        if topology not in self._shares:
            self._shares[topology] = shared_out(self._rollouts, list[Rollout], topology)
        share = self._shares[topology]
        if (topology, drawn) not in self._batches:
            layout = packed_for(topology, self._layout)
            self._batches[topology, drawn] = rollout_batches(share.items, layout, drawn)
        return share, self._batches[topology, drawn]


def experience_of_all(own: Experience, topology: Topology) -> Experience:
    """The experience of all replicas of a layout, by data rank; all ranks must call it.

    Args:
        own: of this replica; as many rollouts on every one.
    """

    def everywhere(rows: Tensor) -> Tensor:
        return of_all_replicas(rows, topology)

    parts, paid = topology.gather(list(own.rollouts), list[Rollout]), own.rewards
    return Experience(
        rollouts=tuple(rollout for part in parts for rollout in part),
        mask_BR=everywhere(own.mask_BR),
        logp_old_BR=everywhere(own.logp_old_BR),
        logp_ref_BR=everywhere(own.logp_ref_BR),
        pool_importance_BR=everywhere(own.pool_importance_BR),
        values_BR=everywhere(own.values_BR),
        advantages_BR=everywhere(own.advantages_BR),
        returns_BR=everywhere(own.returns_BR),
        rewards=replace(
            paid,
            score_BR=everywhere(paid.score_BR),
            dpo_BR=everywhere(paid.dpo_BR),
            kl_BR=everywhere(paid.kl_BR),
            source_BR=None if paid.source_BR is None else everywhere(paid.source_BR),
        ),
        drawn=own.drawn,
    )
