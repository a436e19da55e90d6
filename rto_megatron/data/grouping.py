"""Which items share a micro-batch, and which replica gets which items of a global batch.

An item is what must stay together: a sequence, or the two answers of a pair. All of it is arithmetic on lengths, so
that every rank comes to the same answer by itself.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import batched

from rto_megatron.types import Demonstration, Example, JudgedResponse, PreferencePair, Prompt, Rollout

type Lengths = Sequence[int]  # tokens of the sequences of one item


def in_turn(num_items: int, size: int) -> list[list[int]]:
    """Numbers of items by `size` at a time; the last group may hold fewer."""
    return [list(group) for group in batched(range(num_items), size)]


@dataclass(frozen=True)
class Extent:
    """What the size of a micro-batch depends on.

    Example:
        Extent(num_sequences=2, num_tokens=900, longest=600)
    """

    num_sequences: int
    num_tokens: int
    longest: int

    @classmethod
    def of(cls, lengths: Lengths) -> "Extent":
        """Of the sequences of an item."""
        return cls(len(lengths), sum(lengths), max(lengths))

    def __add__(self, other: "Extent") -> "Extent":
        """Of both together."""
        return Extent(
            self.num_sequences + other.num_sequences,
            self.num_tokens + other.num_tokens,
            max(self.longest, other.longest),
        )


def first_fit(items: Sequence[Lengths], room: int, size: Callable[[Extent], int]) -> list[list[int]]:
    """Groups of at most `room` tokens: the longest item first, each into the first group that still has room for it.

    An item that is larger than the room is alone in its group. The first groups are the fullest: a step that does not
    fit into memory fails at its first micro-batch. Two lists of the same lengths are grouped alike.

    Args:
        size: the tokens that sequences take together.

    Returns:
        the numbers of each group's items, ascending.

    Source: first-fit decreasing; never more than 11/9 of the least number of groups, and one (Dosa, 2007).
    """
    extents = [Extent.of(lengths) for lengths in items]
    sizes = [size(extent) for extent in extents]
    groups: list[list[int]] = []
    held: list[Extent] = []
    for item in sorted(range(len(items)), key=lambda number: (-sizes[number], number)):
        for place, extent in enumerate(held):
            both = extent + extents[item]
            if size(both) <= room:
                groups[place].append(item)
                held[place] = both
                break
        else:
            groups.append([item])
            held.append(extents[item])
    return [sorted(group) for group in groups]


def bundled(
    items: Sequence[Lengths], prompts: Sequence[Hashable], room: int, size: Callable[[Extent], int]
) -> list[list[int]]:
    """Items with one prompt, as many at a time as have room in a micro-batch.

    Args:
        size: see `first_fit`.

    Returns:
        the numbers of each bundle's items, ascending.
    """
    bundles: list[list[int]] = []
    held: list[Extent] = []
    last: dict[Hashable, int] = {}  # of each prompt
    for number, lengths in enumerate(items):
        own, place = Extent.of(lengths), last.get(prompts[number])
        if place is not None and size(held[place] + own) <= room:
            bundles[place].append(number)
            held[place] += own
            continue
        last[prompts[number]] = len(bundles)
        bundles.append([number])
        held.append(own)
    return bundles


def deal(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Items for each of `num_shares` replicas, so that all have about as much to do.

    The dearest item goes to the replica that has least, and so on; ties go by number. Every replica has an item where
    there are as many items as replicas and each costs something.

    Returns:
        the numbers of each share's items, ascending.

    Source: longest processing time first; the dearest share is at most 4/3 of the best there is (Graham, 1969).
    """
    loads = [0.0] * num_shares
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for item in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        lightest = min(range(num_shares), key=lambda share: (loads[share], share))
        shares[lightest].append(item)
        loads[lightest] += costs[item]
    return [sorted(share) for share in shares]


def own_share[T](items: Sequence[T], rank: int, size: int, cost: Callable[[T], float] | None) -> list[T]:
    """The items of replica `rank` of `size`: every `size`-th, or where they cost something its share by cost."""
    if cost is None:
        return list(items[rank::size])
    return [items[number] for number in deal([cost(item) for item in items], size)[rank]]


def lengths_of(example: Example | Rollout) -> tuple[int, ...]:
    """Tokens of the sequences that an example puts into a micro-batch."""
    match example:
        case Prompt():
            return (len(example.token_ids),)
        case PreferencePair():
            prompt = len(example.prompt_ids)
            return prompt + len(example.chosen_ids), prompt + len(example.rejected_ids)
        case Demonstration() | JudgedResponse() | Rollout():
            return (len(example.prompt_ids) + len(example.response_ids),)


def read_lengths(example: Example | Rollout) -> tuple[int, ...]:
    """Tokens of the sequences that a step reads for an example, as often as it does so relative to each other.

    A verdict's answer is trained on and read by the reference, which costs four forwards; the unrelated answer, on
    which the baseline is estimated, costs two.
    """
    if not isinstance(example, JudgedResponse):
        return lengths_of(example)
    return (*lengths_of(example) * 2, len(example.prompt_ids) + len(example.unrelated_ids))


def least_lengths(example: Example | Rollout) -> tuple[int, ...]:
    """Tokens of the same sequences were every response a single token."""
    match example:
        case Prompt():
            return (len(example.token_ids) + 1,)
        case PreferencePair():
            return (len(example.prompt_ids) + 1,) * 2
        case Demonstration() | JudgedResponse() | Rollout():
            return (len(example.prompt_ids) + 1,)
