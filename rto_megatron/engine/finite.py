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
    # A resume takes the second; the first would be another run.
    advice = (
        "look at these samples and at the model that is named. To go on past them, raise run.max_skipped_updates; "
        "another learning rate is another run: name another run.dir, with models.policy at that checkpoint"
    )

    def __init__(self, found: Mapping[str, Sequence[str]]) -> None:
        self.found = {what: list(ids) for what, ids in found.items()}
        parts = [f"{what} on {len(ids)} samples, {ids[:_SHOWN]}" for what, ids in self.found.items()]
        super().__init__(f"{'; '.join(parts)}; no weight was changed")


class EmptyUpdateError(PoisonedError):
    """An update has no token to train on; its numbers are sound, and the configuration is what keeps it so."""

    reason = "CONFIG"
    advice = (
        "start a new run (another run.dir, with models.policy at that checkpoint) with a larger "
        "sampling.max_response_tokens, or with algorithm.truncated=penalise, which trains on cut responses"
    )


def refuse_together(
    found: Mapping[str, Sequence[str]], topology: Topology, kind: type[PoisonedError] = PoisonedError
) -> None:
    """Raises on every rank when any rank found something: nobody steps alone. All ranks must call it.

    Args:
        found: what is wrong with the update of this rank -> ids of the samples; empty: nothing.
        kind: of the error.

    Raises:
        PoisonedError: with what all ranks found.
    """
    merged: dict[str, dict[str, None]] = {}  # ordered sets: the ranks of a replica find the same
    own = {what: list(ids) for what, ids in found.items()}
    for part in topology.gather_all(own, dict[str, list[str]]):
        for what, ids in part.items():
            merged.setdefault(what, {}).update(dict.fromkeys(ids))
    if merged:
        raise kind({what: list(ids) for what, ids in merged.items()})
