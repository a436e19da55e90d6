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

from rto_megatron.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+:\w+")


@dataclass(frozen=True)
class Row:
    """One record and where it stands: `file:line`, or `source row n` where a format has no lines.

    A column that is null is not among its columns: a table that was joined from several has nulls where one of them
    had no such column.

    Example:
        Row(where="prompts.jsonl:1", columns={"prompt": "hello"})
    """

    where: str
    columns: dict[str, object]


@dataclass(frozen=True)
class BadRow:
    """A record that could not be read, among others that can.

    Example:
        BadRow(where="prompts.jsonl:2", problem="not valid JSON")
    """

    where: str
    problem: str


def read_rows(source: str) -> Iterator[Row]:
    """Reads as `scan_rows` does, up to the first row that cannot be read.

    Raises:
        DataError: as `scan_rows`, or names that row.
    """
    for row in scan_rows(source):
        if isinstance(row, BadRow):
            raise DataError(f"{row.where}: {row.problem}")
        yield row


def is_file(source: str) -> bool:
    """Whether a source is a local file by its name, be it there or not."""
    return source.endswith(SUFFIXES)


def scan_rows(source: str) -> Iterator[Row | BadRow]:
    """Rows of a local .jsonl, .jsonl.gz, .json (a list of objects) or .parquet file, or of
    `owner/name:split`.

    Raises:
        DataError: the source does not exist, is empty, damaged or cut short, or is of another kind than its name says.
    """
    path = Path(source)
    if is_file(source):
        if not path.is_file():
            raise DataError(f"data file {source} does not exist (working directory {Path.cwd()})")
        require_kind(path)
        if source.endswith((".jsonl", ".jsonl.gz")):
            return _json_lines(path)
        return _json_list(path) if source.endswith(".json") else _parquet(path)
    if HUB_NAME.fullmatch(source):
        return _hub(source)
    raise DataError(
        f"data source {source!r} is neither a file ending in {', '.join(SUFFIXES)} "
        "nor a hub data set written as owner/name:split"
    )


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
    return _checked(where, value)


def _checked(where: str, value: object) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(where, f"found a JSON {type(value).__name__}, expected an object with columns")
    return Row(where, {column: entry for column, entry in value.items() if entry is not None})


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
        yield _checked(f"{path} row {number}", value)


def _parquet(path: Path) -> Iterator[Row | BadRow]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for columns in _records(batch):
                    number += 1
                    where = f"{path} row {number}"
                    yield BadRow(where, columns) if isinstance(columns, str) else _checked(where, columns)
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


def _hub(source: str) -> Iterator[Row | BadRow]:
    # Imported here because it takes seconds and local files do not need it.
    import datasets

    name, split = source.rsplit(":", 1)
    try:
        table = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, ValueError) as error:
        raise DataError(
            f"data set {name!r}, split {split!r}, could not be loaded from the hub ({error}); "
            "check both names and the network, or give a local file"
        ) from error
    for number, columns in enumerate(table, start=1):
        yield _checked(f"{source} row {number}", columns)


_LINES, _LIST, _GZIP, _PARQUET = "JSON objects, one a line", "one JSON list", "gzip", "parquet"
_EXPECTED = {".jsonl": _LINES, ".gz": _GZIP, ".json": _LIST, ".parquet": _PARQUET}
# First bytes -> what they begin, and what to do about it.
_KINDS = {
    b"\x1f\x8b": (_GZIP, "rename it to .jsonl.gz, or unpack it"),
    b"PAR1": (_PARQUET, "rename it to .parquet"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("zstandard", "unpack it"),
    b"\xfd7zXZ": ("xz", "unpack it"),
    b"BZh": ("bzip2", "unpack it"),
    b"\xff\xfe": ("UTF-16 text", "convert it to UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "convert it to UTF-8"),
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the file behind it with git lfs pull"),
    b"<": ("a web page or XML", "a failed download may have left it; fetch the file again"),
    b"[": (_LIST, "rename it to .json"),
    b"{": (_LINES, "rename it to .jsonl"),
}
_HEAD = 4096  # bytes; blank lines may stand before the text
_BOM = b"\xef\xbb\xbf"


def require_kind(path: Path) -> None:
    """Refuses a file that is empty or of another kind than its name says; what it cannot tell it lets pass.

    Raises:
        DataError: it cannot be read; or says what the file really is and what to do.
    """
    try:
        with path.open("rb") as opened:
            head = opened.read(_HEAD)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); let this user read it") from error
    if not head:
        raise DataError(f"{path} is empty: it has 0 bytes; write it again, or name another file")
    expected = _EXPECTED[path.suffix]
    starts = (head, head.removeprefix(_BOM).lstrip())
    known = (entry for start in starts for magic, entry in _KINDS.items() if start.startswith(magic))
    found, advice = next(known, (expected, ""))
    # A .json file that begins with an object may hold nothing else: only its reader can tell.
    if found != expected and (found, expected) != (_LINES, _LIST):
        raise DataError(f"{path} is named {path.suffix}, for {expected}, but is {found}; {advice}")
