"""Rows of one local file, by its format."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from rto_megatron.data.csv_rows import csv_rows
from rto_megatron.data.file_kinds import require_kind
from rto_megatron.data.row import BadRow, Row, checked
from rto_megatron.errors import DataError


def file_rows(path: Path) -> Iterator[Row | BadRow]:
    """Rows of a .jsonl, .jsonl.gz, .json (a list of objects), .parquet, .csv or .csv.gz file.

    Raises:
        DataError: it is empty, damaged or cut short, or is of another kind than its name says.
    """
    require_kind(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(path)
    if path.name.endswith((".csv", ".csv.gz")):
        return csv_rows(path)
    return _json_list(path) if path.suffix == ".json" else _parquet(path)


def _json_lines(path: Path) -> Iterator[Row | BadRow]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = _decoded(path, line, number)
                if text.strip():
                    yield _parsed(f"{path}:{number}", text)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is not a complete gzip file ({error}); {number} lines could be read; fetch it again"
        ) from error


def _decoded(path: Path, line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text in line {number} ({error}); convert it to UTF-8"
        ) from error


def _parsed(where: str, text: str) -> Row | BadRow:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg} at column {error.colno}); one object per line is expected"
        return BadRow(where, reason)
    except RecursionError:
        return BadRow(where, "not valid JSON (it is nested too deeply)")
    return checked(where, value)


def _json_list(path: Path) -> Iterator[Row | BadRow]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise DataError(
                f"{path}:{error.lineno}: a second JSON value follows the first; a .json file holds one list of "
                "objects: if this one has an object a line, rename it to .jsonl"
            ) from error
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); convert it to UTF-8") from error
    if not isinstance(values, list):
        raise DataError(
            f"{path}: found one JSON {type(values).__name__}, expected a list of objects; if the file has an object a "
            "line, rename it to .jsonl"
        )
    for number, value in enumerate(values, start=1):
        yield checked(f"{path} row {number}", value)


def _parquet(path: Path) -> Iterator[Row | BadRow]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for columns in _records(batch):
                    number += 1
                    where = f"{path} row {number}"
                    yield BadRow(where, columns) if isinstance(columns, str) else checked(where, columns)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path} is not a complete parquet file: what follows row {number} cannot be read ({reason}); fetch it "
            "again, or write it anew from its source"
        ) from error


def _records(batch: pyarrow.RecordBatch) -> list[dict[str, object] | str]:
    """Columns of each row, or why they cannot be read."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [f"a string is not UTF-8 text ({error})"]
    return [record for number in range(batch.num_rows) for record in _records(batch.slice(number, 1))]
