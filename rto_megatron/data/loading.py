"""Reads the rows of one or more sources, gathers what cannot be used, and reports."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from rto_megatron.config.source_names import MixturePart, Sources, parts_of, shown
from rto_megatron.data.bad_rows import BadRows
from rto_megatron.data.encoder import Encoder, OverlongError
from rto_megatron.data.load_report import Loaded, LoadReport, PartReport
from rto_megatron.data.mixture import Portion
from rto_megatron.data.row import BadRow, Row
from rto_megatron.data.sources import scan_rows
from rto_megatron.errors import DataError, TokenizerError, UserError

_REASONS = 3  # why rows were bad, in a report


@dataclass
class _Walk[T]:
    """Grows while sources are read."""

    encoder: Encoder
    convert: Callable[[Row], T | None]
    items: list[T] = field(default_factory=list)
    parts: list[PartReport] = field(default_factory=list)
    num_rows: int = 0
    bad: BadRows = field(default_factory=BadRows)
    overlong: BadRows = field(default_factory=BadRows)
    no_margins: list[int] = field(default_factory=list)  # pairs without one, of each part

    def through(self, part: MixturePart, max_rows: int | None) -> None:
        counts, encoder = self.encoder.counts, self.encoder
        kept, rows, no_margin = len(self.items), self.num_rows, counts["pairs_without_margin"]
        encoder.layouts.clear()
        for row in islice(scan_rows(part.source), max_rows):
            self.num_rows += 1
            self._take(row)
        self.no_margins.append(counts["pairs_without_margin"] - no_margin)
        self.parts.append(
            PartReport(
                part.source, part.weight, self.num_rows - rows, len(self.items) - kept, dict(encoder.layouts)
            )
        )

    def _take(self, row: Row | BadRow) -> None:
        try:
            item = self.convert(_sound(row))
        except TokenizerError:
            raise
        except OverlongError as error:
            self.overlong.add(row.where, str(error))
        except UserError as error:
            self.bad.add(row.where, str(error))
        else:
            if item is not None:
                self.items.append(item)

    def report(self, source: str) -> LoadReport:
        counts = self.encoder.counts
        return LoadReport(
            source=source,
            rows=self.num_rows,
            kept=len(self.items),
            dropped=self.num_rows - len(self.items) - self.bad.number,
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
            bad_rows=self.bad.number,
            reasons=tuple(self.bad.told(limit=_REASONS)),
            parts=tuple(self.parts),
        )


def load_rows[T](
    sources: Sources,
    convert: Callable[[Row], T | None],
    encoder: Encoder,
    max_rows: int | None,
    dropped_as: str | None = None,
) -> Loaded[T]:
    """Converts the rows of all sources; `convert` returns None for a row that is dropped.

    Args:
        max_rows: of all sources together, from the first on.

    Raises:
        UserError: a source or the tokenizer is not sound; or names all rows that cannot be used, unless they are
        dropped; or no row of a source is left; or the parts of a mixture do not fit together.
    """
    walk: _Walk[T] = _Walk(encoder, convert)
    for part in parts_of(sources):
        left = None if max_rows is None else max_rows - walk.num_rows
        walk.through(part, left)
    source, bad = shown(sources), walk.bad
    refuse_rows(
        source, walk.num_rows, bad if encoder.limits.bad_rows == "error" else BadRows(), walk.overlong
    )
    report = walk.report(source)
    if not walk.items:
        _refuse_nothing(report, encoder.limits.max_prompt_tokens, dropped_as)
    _refuse_unlike(report.parts, walk.no_margins, max_rows is not None)
    portions = tuple(Portion(part.kept, part.weight) for part in report.parts)
    return Loaded(tuple(walk.items), report, portions)


def _sound(row: Row | BadRow) -> Row:
    if isinstance(row, BadRow):
        raise DataError(row.problem)
    return row


def refuse_rows(source: str, num_rows: int, bad: BadRows, overlong: BadRows | None = None) -> None:
    """Does nothing without such rows.

    Raises:
        DataError: names all of them.
    """
    overlong = overlong or BadRows()
    if not bad.number and not overlong.number:
        return
    heading = f"{source}: {bad.number + overlong.number} of the {num_rows} rows that were read cannot be used"
    if 0 < bad.number < num_rows:
        heading += "; mend them, or set data.bad_rows=drop to go on without them"
    raise DataError("\n  ".join([f"{heading}:", *bad.told(), *overlong.told()]))


def _refuse_nothing(report: LoadReport, max_prompt_tokens: int, dropped_as: str | None) -> None:
    if not report.rows:
        raise DataError(f"{report.source} holds no row; write it again, or name another file")
    reasons = []
    if report.dropped:
        why = (
            dropped_as or f"with a prompt over its limit; check data.max_prompt_tokens ({max_prompt_tokens})"
        )
        reasons.append(f"{report.dropped} dropped {why}")
    if report.bad_rows:
        reasons.append("\n  ".join([f"{report.bad_rows} bad:", *report.reasons]))
    raise DataError(f"{report.source}: no rows to use; {report.rows} read, {', '.join(reasons)}")


def _refuse_unlike(parts: tuple[PartReport, ...], no_margins: list[int], is_cut: bool) -> None:
    """Parts of which nothing is left, and parts without margins beside parts that have them."""
    problems = []
    if not is_cut:
        empty = [part.source for part in parts if not part.kept]
        problems += [f"{source} has no row to use; remove it from the mixture" for source in empty]
    without = [
        part.source for part, number in zip(parts, no_margins, strict=True) if number and number == part.kept
    ]
    if without and sum(no_margins) < sum(part.kept for part in parts):
        problems.append(
            f"no pair of {', '.join(without)} has a margin, and pairs of the other parts have one; give margins to "
            "all, or set algorithm.margin=false"
        )
    if problems:
        raise DataError("the parts of the mixture do not fit together:\n  " + "\n  ".join(problems))
