"""Rows of one prompt: what they cost together where it is computed once, and which replica takes which of them."""

from collections.abc import Callable, Iterable, Sequence

from rto_megatron.data.grouping import deal
from rto_megatron.types import Prompt, Rollout

type RolloutCost = Callable[[Rollout | Prompt], float]


def by_prompt(rollouts: Sequence[Rollout], rows: Iterable[int]) -> list[list[int]]:
    """Rows of one prompt together, prompts in the order of their first ones.

    Args:
        rows: indices into `rollouts`.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        groups.setdefault(rollouts[row].prompt_ids, []).append(row)
    return list(groups.values())


def cost_together(rollouts: Sequence[Rollout], cost: RolloutCost) -> float:
    """What one replica has to do for some rollouts, of which it computes each prompt once."""
    total = 0.0
    for group in by_prompt(rollouts, range(len(rollouts))):
        first = rollouts[group[0]]
        again = cost(Prompt(first.prompt_id, first.prompt_ids)) * (len(group) - 1)
        total += sum(cost(rollouts[row]) for row in group) - again
    return total


def shares_of_rows(
    rollouts: Sequence[Rollout], rows: Sequence[int], num_shares: int, cost: RolloutCost
) -> list[list[int]]:
    """Rows for each replica: those of a prompt together if that makes the busiest one less busy than single rows.

    Every replica has a row where there are as many rows as replicas.

    Args:
        rows: indices into `rollouts`.
    """

    def of_share(share: Sequence[int]) -> float:
        return cost_together([rollouts[row] for row in share], cost)

    def dealt(units: Sequence[Sequence[int]]) -> list[list[int]]:
        shares = deal([of_share(unit) for unit in units], num_shares)
        return [[row for number in share for row in units[number]] for share in shares]

    alone, together = [[row] for row in rows], by_prompt(rollouts, rows)
    # A replica without a row would have no micro-batch.
    ways = [alone, together] if len(together) >= num_shares else [alone]
    return min(map(dealt, ways), key=lambda shares: max(map(of_share, shares)))
