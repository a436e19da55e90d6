"""What a data file really is, by its first bytes."""

from pathlib import Path

from rto_megatron.errors import DataError

_LINES, _LIST, _GZIP, _PARQUET = "JSON objects, one a line", "one JSON list", "gzip", "parquet"
_TABLE = "comma-separated values"
_EXPECTED = {".jsonl": _LINES, ".gz": _GZIP, ".json": _LIST, ".parquet": _PARQUET, ".csv": _TABLE}
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
