"""The rollouts of a step as the replicas of each role read them, whatever layout the role has.

T  positions of one micro-batch | L  tokens of the longest sequence
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial

from torch import Tensor

from rto_megatron.data.cut import CutSequences, Layout
from rto_megatron.data.packing import rollout_batches
from rto_megatron.engine.absent import RoleModel
from rto_megatron.engine.readings import DRAWN_AND_WHOLE, OUTPUTS, Reading
from rto_megatron.parallel.dealing import Share, of_all_replicas, shared_out
from rto_megatron.parallel.topology import Topology
from rto_megatron.types import WHOLE, Distribution, Rollout, TokenBatch, TrainingRows


def packed_for(topology: Topology, layout: Layout) -> Layout:
    """How a role packs micro-batches: rows are padded by its own layout, and prompts stand once where none is cut."""
    shares_prompts = layout.shares_prompts and topology.context_size == 1
    return replace(layout, multiple_of=topology.row_multiple, shares_prompts=shares_prompts)


class RoleShares:
    """Rollouts of this rank's replica of the policy; all ranks must call its methods together.

    The share of a layout is made once, and read by all roles that have the layout. All ranks meet where shares are made
    and where a model's numbers are told; in between a rank makes the forwards of its own models alone.

    Args:
        layout: of the policy's micro-batches.
        readers: layouts of the models that will be asked.

    Example:
        shares = RoleShares(rollouts, layout, [roles.reference.topology, roles.critic.topology])
        told = [shares.begin(model) for model in (roles.reference, roles.critic)]
        logp_ref, values = (tell() for tell in told)
    """

    def __init__(self, rollouts: Sequence[Rollout], layout: Layout, readers: Iterable[Topology]) -> None:
        self._rollouts, self._layout = list(rollouts), layout
        self._shares = {
            topology: shared_out(self._rollouts, list[Rollout], topology)
            for topology in dict.fromkeys(readers)
        }
        self._cuts: dict[tuple[Topology | None, Distribution], CutSequences] = {}
        self._begun: dict[tuple[int, Distribution], Callable[[], list[Tensor]]] = {}

    def cut(self, drawn: Distribution = WHOLE) -> CutSequences:
        """The policy's micro-batches, see `rollout_batches`."""
        return self._cut(None, self._rollouts, self._layout, drawn)

    def of(self, topology: Topology) -> Share[Rollout]:
        """What a replica of a reader's layout reads."""
        return self._shares[topology]

    def begin(self, model: RoleModel, drawn: Distribution = WHOLE) -> Callable[[], list[Tensor]]:
        """Makes a model's forward, where this rank holds it; one that was made is not made again.

        Args:
            drawn: what log-probs are of.

        Returns:
            what all ranks call then. It gives log-probs, or values, at the positions of the policy's micro-batches, [T]
            each; zeros at padding if it is another layout that read them.
        """
        if (id(model), drawn) not in self._begun:
            (self._begun[id(model), drawn],) = self._begin(model, drawn, OUTPUTS)
        return self._begun[id(model), drawn]

    def begin_both(self, model: RoleModel, drawn: Distribution) -> None:
        """Makes one forward of a language model for both, `drawn` and the whole distribution: `begin` finds it made."""
        if drawn == WHOLE:
            return
        of_drawn, of_whole = self._begin(model, drawn, DRAWN_AND_WHOLE)
        self._begun[id(model), drawn], self._begun[id(model), WHOLE] = of_drawn, of_whole

    def _begin(
        self, model: RoleModel, drawn: Distribution, reading: Reading[TokenBatch]
    ) -> list[Callable[[], list[Tensor]]]:
        """See `begin`, for each row of a reading."""
        own, topology = self.cut(drawn), model.topology
        is_home = topology.home is None
        share = self.of(topology)
        cut = own if is_home else self._cut(topology, share.items, packed_for(topology, self._layout), drawn)
        outputs = cache(model.begin_outputs(cut.batches, reading))
        rows = [partial(_row, outputs, reading.num_rows, number) for number in range(reading.num_rows)]
        return [cache(row if is_home else partial(_told, row, cut, share, own)) for row in rows]

    def _cut(
        self, topology: Topology | None, rollouts: Sequence[Rollout], layout: Layout, drawn: Distribution
    ) -> CutSequences:
        if (topology, drawn) not in self._cuts:
            self._cuts[topology, drawn] = rollout_batches(rollouts, layout, drawn)
        return self._cuts[topology, drawn]


def _row(outputs: Callable[[], list[Tensor]], num_rows: int, number: int) -> list[Tensor]:
    return [one.view(num_rows, -1)[number] for one in outputs()]


def _told(
    outputs: Callable[[], list[Tensor]], cut: CutSequences, share: Share[Rollout], own: CutSequences
) -> list[Tensor]:
    """What a replica of another layout says of its share, at the positions of the policy's micro-batches."""
    width = max(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in share.items)
    said = zip(outputs(), cut.batches, strict=True)
    rows_BL = share.back(cut.in_order([_rows(values_T, batch, width) for values_T, batch in said]))
    return [_positions(rows_BL[rows], batch) for batch, rows in zip(own.batches, own.groups, strict=True)]


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


def experience_of_all(own: TrainingRows, topology: Topology) -> TrainingRows:
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
