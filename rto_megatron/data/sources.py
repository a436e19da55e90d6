"""Rows of a data source with the place each one came from, so that every error can name it."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from rto_megatron.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+:\w+")


@dataclass(frozen=True)
class Row:
    """One record and where it stands: `file:line`, or `source row n` where a format has no lines."""

    where: str
    columns: dict[str, object]


def read_rows(source: str) -> Iterator[Row]:
    """Rows of a local .jsonl, .jsonl.gz, .json (a list of objects) or .parquet file, or of
    `owner/name:split`.

    Raises:
        UserError: the source does not exist, is of another kind, is cut short, or a row is not a JSON
        object.
    """
    path = Path(source)
    if source.endswith(SUFFIXES):
        if not path.is_file():
            raise UserError(f"data file {source} does not exist (working directory {Path.cwd()})")
        if source.endswith((".jsonl", ".jsonl.gz")):
            return _json_lines(path)
        return _json_list(path) if source.endswith(".json") else _parquet(path)
    if HUB_NAME.fullmatch(source):
        return _hub(source)
    raise UserError(
        f"data source {source!r} is neither a file ending in {', '.join(SUFFIXES)} "
        "nor a hub data set written as owner/name:split"
    )


def _json_lines(path: Path) -> Iterator[Row]:
    open_text = gzip.open if path.suffix == ".gz" else open
    line_number = 0
    try:
        with open_text(path, "rt", encoding="utf-8") as lines:
            for line_number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parsed(f"{path}:{line_number}", line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path} is not a complete gzip file ({error}); {line_number} lines could be read; fetch it again"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text after line {line_number} ({error}); convert it to UTF-8"
        ) from error


def _parsed(where: str, text: str) -> Row:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); one object per line is expected"
        ) from error
    return _checked(where, value)


def _checked(where: str, value: object) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: found a JSON {type(value).__name__}, expected an object with columns")
    return Row(where, value)


def _json_list(path: Path) -> Iterator[Row]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); convert it to UTF-8") from error
    if not isinstance(values, list):
        raise UserError(f"{path}: found a JSON {type(values).__name__}, expected a list of objects")
    for number, value in enumerate(values, start=1):
        yield _checked(f"{path} row {number}", value)


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", columns)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a complete parquet file ({error}); fetch it again") from error


def _hub(source: str) -> Iterator[Row]:
    # Imported here because it takes seconds and local files do not need it.
    import datasets

    name, split = source.rsplit(":", 1)
    try:
        table = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, ValueError) as error:
        raise UserError(
            f"data set {name!r}, split {split!r}, could not be loaded from the hub ({error}); "
            "check both names and the network, or give a local file"
        ) from error
    for number, columns in enumerate(table, start=1):
        yield _checked(f"{source} row {number}", columns)
