"""Files that are not what their names say, and damaged ones, are named with what they really are."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data.written_rows import demonstration, write_lines

from rto_megatron.data.row import BadRow
from rto_megatron.data.sources import read_rows, scan_rows
from rto_megatron.errors import DataError

ROWS = [demonstration("the dog"), demonstration("a dog")]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def parquet(path: Path, num_rows: int = 2) -> bytes:
    table = pyarrow.table({"text": [f"row {number} " + "x" * 50 for number in range(num_rows)]})
    pyarrow.parquet.write_table(table, path, compression="snappy", use_dictionary=False)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json"])
def test_a_byte_order_mark_is_read(name: str, tmp_path: Path) -> None:
    text = json.dumps(ROWS) if name.endswith(".json") else LINES
    content = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [row.columns for row in read_rows(str(tmp_path / name))] == ROWS


WRONG_NAMES: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "gzip": ("rows.jsonl", lambda path: gzip.compress(LINES.encode()), "is gzip; rename it to .jsonl.gz"),
    "text": (
        "rows.jsonl.gz",
        lambda path: LINES.encode(),
        "is JSON objects, one a line; rename it to .jsonl",
    ),
    "lines": ("rows.json", lambda path: LINES.encode(), "an object a line, rename it to .jsonl"),
    "one line": (
        "rows.json",
        lambda path: LINES.splitlines()[0].encode(),
        "an object a line, rename it to .jsonl",
    ),
    "list": (
        "rows.jsonl",
        lambda path: json.dumps(ROWS, indent=1).encode(),
        "is one JSON list; rename it to .json",
    ),
    "parquet": ("rows.jsonl", parquet, "is parquet; rename it to .parquet"),
    "lines as parquet": ("rows.parquet", lambda path: LINES.encode(), "rename it to .jsonl"),
    "pointer": (
        "rows.parquet",
        lambda path: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "is a Git LFS pointer; fetch the file behind it",
    ),
    "page": ("rows.jsonl", lambda path: b"<!DOCTYPE html><html></html>", "is a web page or XML"),
    "UTF-16": ("rows.jsonl", lambda path: LINES.encode("utf-16"), "is UTF-16 text; convert it to UTF-8"),
    "empty": ("rows.jsonl", lambda path: b"", "is empty: it has 0 bytes"),
    "empty list": ("rows.parquet", lambda path: b"", "is empty: it has 0 bytes"),
    "Latin-1": ("rows.jsonl", lambda path: '{}\n{"a": "é"}\n'.encode("latin-1"), "not UTF-8 text in line 2"),
}


@pytest.mark.parametrize("case", WRONG_NAMES)
def test_a_file_is_named_for_what_it_is(case: str, tmp_path: Path) -> None:
    name, content, message = WRONG_NAMES[case]
    (tmp_path / name).write_bytes(content(tmp_path / "other.parquet"))
    with pytest.raises(DataError) as caught:
        list(scan_rows(str(tmp_path / name)))
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    source = write_lines(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read .*Permission denied"):
        list(scan_rows(source))


def test_a_damaged_parquet_file_is_named_with_the_last_whole_row(tmp_path: Path) -> None:
    path = tmp_path / "damaged.parquet"
    content = bytearray(parquet(path, 5000))
    content[10:40] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"damaged\.parquet is not a complete parquet file: what follows row 0"
    ):
        list(scan_rows(str(path)))


def test_a_string_of_a_parquet_file_that_is_no_text_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "bytes.parquet"
    values = [b"one", b"two \xff", b"three"]
    array = pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), path)
    one, two, three = scan_rows(str(path))
    assert isinstance(two, BadRow) and two.where == f"{path} row 2" and "not UTF-8" in two.problem
    assert not isinstance(one, BadRow) and not isinstance(three, BadRow)
    assert [one.columns, three.columns] == [{"text": "one"}, {"text": "three"}]
