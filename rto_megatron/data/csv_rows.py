"""Rows of a table of comma-separated values, whose cells are text until their column says otherwise."""

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rto_megatron.data.messages import parsed
from rto_megatron.data.row import BadRow, Row
from rto_megatron.errors import DataError

_TRUTH = {"true": True, "false": False}
_NUMBERS = ("margin", "score_chosen", "score_rejected")
_LONGEST = 1 << 28  # characters of a cell; Python's own limit is below long conversations


def csv_rows(path: Path) -> Iterator[Row | BadRow]:
    """Rows of a .csv or .csv.gz file whose first line names the columns; an empty cell is no column of its row.

    `label` is read as true or false, margins and scores as numbers, and a JSON list of objects as messages.

    Raises:
        DataError: the first line does not name every column once, or the file is damaged.
    """
    csv.field_size_limit(_LONGEST)
    number = 0
    try:
        with _opened(path) as lines:
            table = csv.reader(lines, strict=True)
            names = _names(path, next(table, []))
            for number, cells in enumerate(table, start=1):
                if cells:
                    yield _row(f"{path} row {number}", names, cells)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is not a complete gzip file ({error}); {number} rows could be read; fetch it again"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text behind row {number} ({error}); convert it to UTF-8"
        ) from error
    except csv.Error as error:
        raise DataError(
            f"{path}: what follows row {number} is no comma-separated table ({error}); a cell with quotes or line "
            "breaks stands in quotes, and quotes in it are doubled"
        ) from error


def _opened(path: Path) -> TextIO:
    binary = path.open("rb")
    plain = gzip.GzipFile(fileobj=binary) if path.suffix == ".gz" else binary
    return io.TextIOWrapper(plain, encoding="utf-8-sig", newline="")


def _names(path: Path, names: list[str]) -> list[str]:
    if names and not names[0] and all(names[1:]):
        raise DataError(
            f"{path}: its first column has no name, as the index that pandas writes; write the table without it "
            "(to_csv(..., index=False)), or name it"
        )
    if not names or "" in names or len(set(names)) < len(names):
        raise DataError(
            f"{path}: its first line is {names!r:.80}, expected the name of every column, each once; add that line"
        )
    return names


def _row(where: str, names: list[str], cells: list[str]) -> Row | BadRow:
    if len(cells) != len(names):
        return BadRow(where, f"has {len(cells)} cells, and the first line names {len(names)} columns")
    columns: dict[str, object] = {}
    for name, cell in zip(names, cells, strict=True):
        if not cell:
            continue
        if cell.startswith("[{'"):
            return BadRow(
                where,
                f"column {name!r} is a list as Python prints it ({cell!r:.40}); write it as JSON (json.dumps)",
            )
        columns[name] = _value(name, cell)
    return Row(where, columns)


def _value(name: str, cell: str) -> object:
    if name == "label":
        return _TRUTH.get(cell.lower(), cell)
    if name in _NUMBERS:
        try:
            return float(cell)
        except ValueError:
            return cell
    value = parsed(cell) if cell.startswith("[") else cell
    is_messages = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    return value if is_messages else cell
