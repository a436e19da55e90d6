"""What became of the rows of a source, or of the parts of a mixture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rto_megatron.data.mixture import Portion


@dataclass(frozen=True)
class PartReport:
    """Of one source alone.

    Example:
        PartReport("chat.jsonl", weight=2.0, rows=10, kept=9, layouts={"messages": 10}).line()
    """

    source: str
    weight: float
    rows: int
    kept: int
    layouts: Mapping[str, int]  # rows by the layout that they were read in

    def line(self) -> str:
        """What was read, without the counts that are the mixture's."""
        weight = "" if self.weight == 1 else f", read {self.weight:g} times a pass"
        return f"{self.source}: {self.rows} rows read, {self.kept} kept{weight}; {self.layout_line()}"

    def layout_line(self) -> str:
        """How rows were read."""
        named = [f"{layout} ({number} rows)" for layout, number in self.layouts.items()]
        return f"layout: {', '.join(named) or 'none'}"


@dataclass(frozen=True)
class LoadReport:
    """What became of the rows of all sources; all but the first and the last two are counts.

    Example:
        print(report.summary())
    """

    source: str
    rows: int
    kept: int
    dropped: int  # rows whose prompt was over the limit, and texts of one token
    truncated_prompts: int
    truncated_answers: int
    truncated_answers_closed: int  # of these, those whose last kept token became end-of-sequence
    answers_cut_at_eos: int  # answers whose text spelt the end-of-sequence token before its end
    identical_pairs: int  # pairs whose two answers are the same ids: kept, but they teach nothing
    earlier_thoughts_left_out: int  # reasoning of turns before an answer that the template does not render
    answers_joined_apart: int  # answers whose rendered prompt is not how the rendered conversation begins
    thoughts_left_open: int  # answers that do not close the thought that the prompt opens
    turns_without_end: int  # learnt turns behind which the template writes no end-of-sequence token
    pairs_without_margin: int  # where margins are read: kept, with margin 0
    bad_rows: int  # rows that could not be used, left out
    reasons: tuple[str, ...]  # why, of the first bad rows
    parts: tuple[PartReport, ...]

    def summary(self) -> str:
        """One line: rows read and kept, and every other count that is not zero; below it why rows were bad, and the
        layouts in which rows were read, for each part of a mixture."""
        counts = [(name, count) for name, count in list(asdict(self).items())[3:] if isinstance(count, int)]
        others = [f"{count} {name.replace('_', ' ')}" for name, count in counts if count]
        line = ", ".join([f"{self.source}: {self.rows} rows read", f"{self.kept} kept", *others])
        is_mixture = len(self.parts) > 1
        below = [part.line() if is_mixture else part.layout_line() for part in self.parts]
        return "\n  ".join([line, *self.reasons, *below])


@dataclass(frozen=True)
class Loaded[T]:
    """Items in the order of the files, the report, and what a pass takes of each part.

    Example:
        num_examples = len(loaded.items)
    """

    items: Sequence[T]
    report: LoadReport
    portions: tuple[Portion, ...]
