"""Whether an update may be made: what is wrong with its numbers on any rank, agreed by all."""

from collections.abc import Mapping, Sequence

from rto_megatron.errors import UserError
from rto_megatron.parallel.topology import Topology

_SHOWN = 8  # ids in a message; `PoisonedError.found` has all


class PoisonedError(UserError):
    """Numbers that must not reach the weights; nothing was stepped.

    Args:
        found: what is wrong -> ids of the samples, of all ranks.
    """

    reason = "NAN"

    def __init__(self, found: Mapping[str, Sequence[str]]) -> None:
        self.found = {what: list(ids) for what, ids in found.items()}
        parts = [f"{what} on {len(ids)} samples, {ids[:_SHOWN]}" for what, ids in self.found.items()]
        super().__init__(f"{'; '.join(parts)}; no weight was changed")


def refuse_together(found: Mapping[str, Sequence[str]], topology: Topology) -> None:
    """Raises on every rank when any rank found something: nobody steps alone. All ranks must call it.

    Args:
        found: what is wrong with the numbers of this rank -> ids of the samples; empty: nothing.

    Raises:
        PoisonedError: with what all ranks found.
    """
    merged: dict[str, dict[str, None]] = {}  # ordered sets: the ranks of a replica find the same
    for part in topology.gather_all_json({what: list(ids) for what, ids in found.items()}):
        assert isinstance(part, dict)
        for what, ids in part.items():
            assert isinstance(ids, list)
            merged.setdefault(what, {}).update(dict.fromkeys(map(str, ids)))
    if merged:
        raise PoisonedError({what: list(ids) for what, ids in merged.items()})
