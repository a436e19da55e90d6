"""Answers with what sources of rewards gave them, for people who try a reward."""

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from rto_megatron.reporting.progress import plain
from rto_megatron.rewards.sample import Sample

_MAX_CHARACTERS = 400  # of a prompt (its end) or an answer (its beginning)

type Rated = tuple[Sample, Mapping[str, float]]  # an answer, and source -> what it gave


def spread_table(rated: Sequence[Rated]) -> Table:
    """Mean, lowest and highest number of each source."""
    table = Table(title=f"{len(rated)} answers")
    table.add_column("reward")
    for name in ("mean", "lowest", "highest"):
        table.add_column(name, justify="right")
    for name in rated[0][1]:
        numbers = [given[name] for _, given in rated]
        shown = (sum(numbers) / len(numbers), min(numbers), max(numbers))
        table.add_row(name, *(f"{number:+.3f}" for number in shown))
    return table


def extremes_table(rated: Sequence[Rated], num_examples: int) -> Table:
    """The lowest answers and the highest ones by the first source, the lowest first, none twice."""
    (first, *_) = rated[0][1]
    order = sorted(rated, key=lambda one: one[1][first])
    kept = order if len(order) <= 2 * num_examples else [*order[:num_examples], *order[-num_examples:]]
    table = Table(title=f"the lowest and the highest by {first}", show_lines=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("answer", ratio=3, overflow="fold")
    for name in rated[0][1]:
        table.add_column(name, justify="right", no_wrap=True)
    for sample, given in kept:
        table.add_row(
            Text(plain(sample.prompt)[-_MAX_CHARACTERS:]),
            Text(plain(sample.response)[:_MAX_CHARACTERS]),
            *(f"{number:+.3f}" for number in given.values()),
        )
    return table
