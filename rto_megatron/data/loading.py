"""Reads the rows of one or more sources, gathers what cannot be used, and reports."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from rto_megatron.config.source_names import MixturePart, Sources, parts_of, shown
from rto_megatron.data.bad_rows import BadRows
from rto_megatron.data.encoder import Encoder, OverlongError
from rto_megatron.data.load_report import Loaded, LoadReport
from rto_megatron.data.mixture import Portion
from rto_megatron.data.row import BadRow, Row
from rto_megatron.data.sources import scan_rows, size_of
from rto_megatron.data.stored import ExampleWriter, StoredExamples
from rto_megatron.data.tally import PartTally, RowTally, added, from_json, gathered
from rto_megatron.data.workers import num_workers, run_workers
from rto_megatron.errors import DataError, TokenizerError, UserError
from rto_megatron.types import Example

_TALLY = "tally.json"
_BLOCK = 64  # rows one after another that one process takes


@dataclass
class _Walk[T]:
    """A way through all rows, of which one process converts every so many blocks."""

    encoder: Encoder
    convert: Callable[[Row], T | None]
    take: Callable[[int, T], None]  # with the number of the row
    worker: int = 0
    num_workers: int = 1
    number: int = 0  # of the next row
    tally: RowTally = field(default_factory=RowTally)

    def through(self, sources: Sources, max_rows: int | None) -> RowTally:
        for part in parts_of(sources):
            self._through(part, None if max_rows is None else max_rows - self.number)
        return self.tally

    def _through(self, part: MixturePart, max_rows: int | None) -> None:
        own = PartTally()
        self.tally.parts.append(own)
        self.encoder.counts.clear()
        self.encoder.layouts.clear()
        for row in islice(scan_rows(part.source), max_rows):
            if (self.number // _BLOCK) % self.num_workers == self.worker:
                own.rows += 1
                own.kept += self._takes(row)
            self.number += 1
        own.layouts, own.counts = Counter(self.encoder.layouts), Counter(self.encoder.counts)

    def _takes(self, row: Row | BadRow) -> bool:
        """Whether the row becomes an example."""
        try:
            item = self.convert(_sound(row))
        except TokenizerError:
            raise
        except OverlongError as error:
            self.tally.overlong.append((self.number, row.where, str(error)))
        except UserError as error:
            self.tally.bad.append((self.number, row.where, str(error)))
        else:
            if item is not None:
                self.take(self.number, item)
                return True
        return False


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
    items: list[T] = []
    tally = _Walk(encoder, convert, lambda _, item: items.append(item)).through(sources, max_rows)
    return Loaded(tuple(items), *_judged(sources, tally, encoder, max_rows, dropped_as))


def load_examples[T: Example](
    sources: Sources,
    convert: Callable[[Row], T | None],
    encoder: Encoder,
    max_rows: int | None,
    shards: Path | None,
    dropped_as: str | None = None,
) -> Loaded[T]:
    """Does what `load_rows` does, and with `shards` in several processes where the sources are large.

    Args:
        shards: an empty folder, in which the examples then lie as long as they are used; None: they lie in memory.
    """
    if shards is None:
        return load_rows(sources, convert, encoder, max_rows, dropped_as)
    count = num_workers(sum(size_of(part.source) for part in parts_of(sources)), max_rows)
    is_done = count > 1 and run_workers(
        partial(_work, shards, count, sources, convert, encoder, max_rows), count
    )
    if not is_done:  # what failed in a process of its own fails here too, and says why
        for left in shards.iterdir():
            shutil.rmtree(left)
        count = 1
        _work(shards, count, sources, convert, encoder, max_rows, 0)
    tally = added([from_json(path.read_bytes()) for path in sorted(shards.glob(f"*/{_TALLY}"))])
    return Loaded(StoredExamples[T].opened(shards), *_judged(sources, tally, encoder, max_rows, dropped_as))


def _work[T: Example](
    shards: Path,
    count: int,
    sources: Sources,
    convert: Callable[[Row], T | None],
    encoder: Encoder,
    max_rows: int | None,
    worker: int,
) -> None:
    folder = shards / f"shard_{worker}"
    with ExampleWriter[T](folder) as writer:
        tally = _Walk(encoder, convert, writer.add, worker, count).through(sources, max_rows)
    (folder / _TALLY).write_bytes(tally.to_json())


def _judged(
    sources: Sources, tally: RowTally, encoder: Encoder, max_rows: int | None, dropped_as: str | None
) -> tuple[LoadReport, tuple[Portion, ...]]:
    source, parts = shown(sources), parts_of(sources)
    bad = gathered(tally.bad) if encoder.limits.bad_rows == "error" else BadRows()
    refuse_rows(source, tally.rows, bad, gathered(tally.overlong))
    report = tally.report(source, parts)
    if not report.kept:
        _refuse_nothing(report, encoder.limits.max_prompt_tokens, dropped_as)
    if len(parts) > 1:
        _refuse_unlike(parts, tally.parts, max_rows is not None)
    return report, tuple(Portion(part.kept, part.weight) for part in report.parts)


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


def _refuse_unlike(parts: Sequence[MixturePart], tallies: Sequence[PartTally], is_cut: bool) -> None:
    """Parts of which nothing is left, and parts without margins beside parts that have them."""
    both = list(zip(parts, tallies, strict=True))
    empty = [part.source for part, tally in both if not tally.kept and not is_cut]
    problems = [f"{source} has no row to use; remove it from the mixture" for source in empty]
    lacking = [(part.source, tally.counts["pairs_without_margin"], tally.kept) for part, tally in both]
    without = [source for source, number, kept in lacking if number and number == kept]
    if without and sum(number for _, number, _ in lacking) < sum(kept for _, _, kept in lacking):
        problems.append(
            f"no pair of {', '.join(without)} has a margin, and pairs of the other parts have one; give margins to "
            "all, or set algorithm.margin=false"
        )
    if problems:
        raise DataError("the parts of the mixture do not fit together:\n  " + "\n  ".join(problems))
