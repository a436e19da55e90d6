"""A file to which one entry a line is added as soon as it is known, so that a kill loses none that was written."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rto_megatron.errors import RunFolderError

type Entry = dict[str, object]


class Journal:
    """JSON objects, one a line; a context manager that keeps the file open. One process may write at a time.

    A last line that a kill cut in two is removed when the file is opened.

    Args:
        path: made when absent, in a folder that exists; its owner's alone.

    Raises:
        RunFolderError: a line before the last is no JSON object.

    Example:
        journal.append({"key": "q1", "answer": "Four."})
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: tuple[Entry, ...] = ()

    def __enter__(self) -> Self:
        self._file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        self.entries = self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, entry: Mapping[str, object]) -> None:
        """Adds an entry; it is in the file when this returns."""
        self._file.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()

    def _read(self) -> tuple[Entry, ...]:
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        self._file.seek(whole)
        return tuple(self._entry(line, number) for number, line in enumerate(content[:whole].splitlines(), 1))

    def _entry(self, line: bytes, number: int) -> Entry:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RunFolderError(
                f"{self._path}:{number} is no JSON object; the file is damaged: remove that line to have its part "
                "made again"
            )
        return found
