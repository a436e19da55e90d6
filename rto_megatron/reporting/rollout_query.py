"""Which kept rollouts somebody wants to see, in which order, and how they are printed."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table
from rich.text import Text

from rto_megatron.config.problems import suggestion
from rto_megatron.errors import RunFolderError
from rto_megatron.reporting.progress import plain
from rto_megatron.reporting.rollout_files import read_rollouts
from rto_megatron.types import FinishReason

_MAX_CHARACTERS = 300  # of a prompt (its end) or a response (its beginning)


@dataclass(frozen=True)
class RolloutQuery:
    """What is asked for; None and empty: everything.

    Example:
        RolloutQuery(steps=(3,), least=0.5, sort="reward", is_descending=True)
    """

    steps: tuple[int, ...] = ()
    prompt_ids: tuple[str, ...] = ()
    least: float | None = None  # of `by`
    most: float | None = None
    by: str = "reward"  # column that `least` and `most` are of
    finish_reason: FinishReason | None = None
    sort: str | None = None  # column; None: as sampled
    is_descending: bool = False


def find_rollouts(run_dir: Path, query: RolloutQuery) -> pa.Table:
    """The rollouts of a run that fit.

    Raises:
        RunFolderError: none are kept, or not of those steps, or a column or prompt is not there.
    """
    table = read_rollouts(run_dir, query.steps)
    for column in (query.by, query.sort):
        if column is not None:
            _require_number_or_text(table, column, run_dir)
    if query.prompt_ids:
        known = set(table["prompt_id"].to_pylist())
        missing = [one for one in query.prompt_ids if one not in known]
        if missing:
            raise RunFolderError(
                f"{run_dir} keeps no rollouts of prompt {', '.join(missing)}{suggestion(missing[0], known)}; "
                f"there are {len(known)}, such as {min(known)}"
            )
        table = table.filter(pc.is_in(table["prompt_id"], pa.array(query.prompt_ids)))
    if query.least is not None:
        table = table.filter(pc.greater_equal(table[query.by], query.least))
    if query.most is not None:
        table = table.filter(pc.less_equal(table[query.by], query.most))
    if query.finish_reason is not None:
        table = table.filter(pc.equal(table["finish_reason"], query.finish_reason))
    if query.sort is not None:
        order = "descending" if query.is_descending else "ascending"
        table = table.take(pc.sort_indices(table, [(query.sort, order)]))
    return table


def _require_number_or_text(table: pa.Table, column: str, run_dir: Path) -> None:
    plain_columns = [field.name for field in table.schema if not pa.types.is_list(field.type)]
    if column not in plain_columns:
        kind = "a list for each response" if column in table.column_names else "not there"
        raise RunFolderError(
            f"{run_dir}: column {column!r} of the rollouts is {kind}{suggestion(column, plain_columns)}; there are "
            f"{', '.join(plain_columns)}"
        )


def shown(table: pa.Table, num_rows: int, title: str) -> Table:
    """A text table of the first rows: prompt, response, and every number of a response."""
    numbers = [
        field.name
        for field in table.schema
        if not pa.types.is_list(field.type) and field.name not in ("prompt", "response")
    ]
    view = Table(title=Text(plain(title)), show_lines=True)
    for name in numbers:
        view.add_column(Text(plain(name)), overflow="fold")
    view.add_column("prompt", ratio=2, overflow="fold", min_width=12)
    view.add_column("response", ratio=3, overflow="fold", min_width=16)
    for row in table.slice(0, num_rows).to_pylist():
        texts = (row["prompt"][-_MAX_CHARACTERS:], row["response"][:_MAX_CHARACTERS])
        view.add_row(*(Text(plain(_cell(row[name]))) for name in numbers), *(Text(plain(t)) for t in texts))
    return view


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def json_lines(table: pa.Table, num_rows: int) -> Iterable[str]:
    """A JSON object for each of the first rows; numbers that are not finite are null."""
    for row in table.slice(0, num_rows).to_pylist():
        yield json.dumps(_finite(row), allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return {name: _finite(one) for name, one in value.items()} if isinstance(value, dict) else value
