"""The rollouts of a step as the replicas of each role read them, whatever layout the role has.

T  positions of one micro-batch | L  tokens of the longest sequence
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from rto_megatron.data.cut import CutSequences, Layout
from rto_megatron.data.packing import rollout_batches
from rto_megatron.engine.absent import RoleModel
from rto_megatron.parallel.dealing import Share, of_all_replicas, shared_out
from rto_megatron.parallel.topology import Topology
from rto_megatron.types import WHOLE, Distribution, Experience, Rollout, TokenBatch, TrainingRows


def packed_for(topology: Topology, layout: Layout) -> Layout:
    """How a role's micro-batches are packed: rows are padded by its own layout."""
    return replace(layout, multiple_of=topology.row_multiple)


class RoleShares:
    """Rollouts of this rank's replica of the policy; all ranks must call its methods together.

    The share of a layout is made once, and read by all roles that have the layout.

    Args:
        layout: of the policy's micro-batches.

    Example:
        logp_ref = RoleShares(rollouts, layout).outputs(roles.reference)
    """

    def __init__(self, rollouts: Sequence[Rollout], layout: Layout) -> None:
        self._rollouts, self._layout = list(rollouts), layout
        self._shares: dict[Topology, Share[Rollout]] = {}
        self._cuts: dict[tuple[Topology | None, Distribution], CutSequences] = {}

    def cut(self, drawn: Distribution = WHOLE) -> CutSequences:
        """The policy's micro-batches, see `rollout_batches`."""
        return self._cut(None, self._rollouts, self._layout, drawn)

    def outputs(self, model: RoleModel, drawn: Distribution = WHOLE) -> list[Tensor]:
        """Log-probs, or values, at the positions of the policy's micro-batches, [T] each; zeros at padding if it is
        another layout that read them.

        Args:
            drawn: what log-probs are of.
        """
        own, topology = self.cut(drawn), model.topology
        if topology.home is None:
            return model.token_outputs(own.batches)
        if topology not in self._shares:
            self._shares[topology] = shared_out(self._rollouts, list[Rollout], topology)
        share = self._shares[topology]
        cut = self._cut(topology, share.items, packed_for(topology, self._layout), drawn)
        width = max(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in share.items)
        said = zip(model.token_outputs(cut.batches), cut.batches, strict=True)
        rows_BL = share.back(cut.in_order([_rows(values_T, batch, width) for values_T, batch in said]))
        return [_positions(rows_BL[rows], batch) for batch, rows in zip(own.batches, own.groups, strict=True)]

    def _cut(
        self, topology: Topology | None, rollouts: Sequence[Rollout], layout: Layout, drawn: Distribution
    ) -> CutSequences:
        if (topology, drawn) not in self._cuts:
            self._cuts[topology, drawn] = rollout_batches(rollouts, layout, drawn)
        return self._cuts[topology, drawn]


def _rows(values_T: Tensor, batch: TokenBatch, width: int) -> Tensor:
    """One row for each sequence, zeros behind its end."""
    rows_SL = values_T.new_zeros(len(batch.last_positions), width)
    for row, (start, last) in enumerate(zip(batch.cu_seqlens, batch.last_positions, strict=False)):
        rows_SL[row, : last + 1 - start] = values_T[start : last + 1]
    return rows_SL


def _positions(rows_SL: Tensor, batch: TokenBatch) -> Tensor:
    """Inverse of `_rows`."""
    values_T = rows_SL.new_zeros(batch.tokens_T.shape)
    for row, (start, last) in enumerate(zip(batch.cu_seqlens, batch.last_positions, strict=False)):
        values_T[start : last + 1] = rows_SL[row, : last + 1 - start]
    return values_T


def experience_of_all(own: Experience | TrainingRows, topology: Topology) -> TrainingRows:
    """The rows of all replicas of a layout, by data rank; all ranks must call it.

    Args:
        own: of this replica; as many rollouts on every one.
    """

    def everywhere(rows: Tensor) -> Tensor:
        return of_all_replicas(rows, topology)

    parts = topology.gather(list(own.rollouts), list[Rollout])
    return TrainingRows(
        rollouts=tuple(rollout for part in parts for rollout in part),
        mask_BR=everywhere(own.mask_BR),
        logp_old_BR=everywhere(own.logp_old_BR),
        logp_ref_BR=everywhere(own.logp_ref_BR),
        pool_importance_BR=everywhere(own.pool_importance_BR),
        values_BR=everywhere(own.values_BR),
        advantages_BR=everywhere(own.advantages_BR),
        returns_BR=everywhere(own.returns_BR),
        drawn=own.drawn,
    )
