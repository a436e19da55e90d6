"""What is counted while rows are read, by one process or by several that share them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from pydantic import TypeAdapter

from rto_megatron.config.source_names import MixturePart
from rto_megatron.data.bad_rows import BadRows
from rto_megatron.data.load_report import LoadReport, PartReport

_REASONS = 3  # why rows were bad, in a report

type Problem = tuple[int, str, str]  # number of the row among all that are read, its place, what is wrong


@dataclass
class PartTally:
    """Of one source.

    Example:
        PartTally(rows=10, kept=9)
    """

    rows: int = 0
    kept: int = 0
    layouts: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass
class RowTally:
    """Of all sources; grows while rows are read.

    Example:
        RowTally([PartTally()]).report("chat.jsonl", parts)
    """

    parts: list[PartTally] = field(default_factory=list)
    bad: list[Problem] = field(default_factory=list)
    overlong: list[Problem] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows that were read."""
        return sum(part.rows for part in self.parts)

    @property
    def kept(self) -> int:
        """Rows that became an example."""
        return sum(part.kept for part in self.parts)

    def to_json(self) -> bytes:
        """As another process reads it."""
        return TypeAdapter(RowTally).dump_json(self)

    def report(self, source: str, parts: Sequence[MixturePart]) -> LoadReport:
        """What became of the rows, for people."""
        counts: Counter[str] = sum((part.counts for part in self.parts), Counter())
        bad = gathered(self.bad)
        return LoadReport(
            source=source,
            rows=self.rows,
            kept=self.kept,
            dropped=self.rows - self.kept - bad.number,
            truncated_prompts=counts["truncated_prompts"],
            truncated_answers=counts["truncated_answers"],
            truncated_answers_closed=counts["truncated_answers_closed"],
            answers_cut_at_eos=counts["answers_cut_at_eos"],
            identical_pairs=counts["identical_pairs"],
            earlier_thoughts_left_out=counts["earlier_thoughts_left_out"],
            answers_joined_apart=counts["answers_joined_apart"],
            thoughts_left_open=counts["thoughts_left_open"],
            turns_without_end=counts["turns_without_end"],
            pairs_without_margin=counts["pairs_without_margin"],
            bad_rows=bad.number,
            reasons=tuple(bad.told(limit=_REASONS)),
            parts=tuple(
                PartReport(part.source, part.weight, own.rows, own.kept, dict(own.layouts))
                for part, own in zip(parts, self.parts, strict=True)
            ),
        )


def from_json(text: bytes) -> RowTally:
    """What `RowTally.to_json` wrote."""
    return TypeAdapter(RowTally).validate_json(text)


def added(tallies: Sequence[RowTally]) -> RowTally:
    """Of rows that several processes shared, in the order of the rows."""
    parts = [
        PartTally(
            sum(part.rows for part in shares),
            sum(part.kept for part in shares),
            sum((part.layouts for part in shares), Counter()),
            sum((part.counts for part in shares), Counter()),
        )
        for shares in zip(*(tally.parts for tally in tallies), strict=True)
    ]
    bad, overlong = (
        sorted(problem for tally in tallies for problem in asdict(tally)[name])
        for name in ("bad", "overlong")
    )
    return RowTally(parts, bad, overlong)


def gathered(problems: Sequence[Problem]) -> BadRows:
    """Rows that cannot be used, alike ones together."""
    rows = BadRows()
    for _, where, message in sorted(problems):
        rows.add(where, message)
    return rows
