"""Entries of the folder of tokenized data: written by one process, whole or not at all; read with digests checked."""

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from rto_megatron.data.load_report import Loaded, LoadReport
from rto_megatron.data.mixture import Portion
from rto_megatron.data.stored import ExampleWriter, StoredExamples
from rto_megatron.types import Example

_META = "meta"  # its own sha256 in the first line, then JSON


@dataclass(frozen=True)
class _Meta:
    """What an entry says of itself."""

    files: dict[str, str]  # path in the entry -> sha256
    report: LoadReport
    portions: tuple[Portion, ...]
    digest: str
    vocabulary: frozenset[int]


@contextmanager
def locked(path: Path, is_shared: bool) -> Iterator[None]:
    """Alone with an entry, of all processes, or among readers; the lock ends with its holder."""
    with path.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX)
        yield


def write_entry[T: Example](folder: Path, loaded: Loaded[T]) -> None:
    """Writes what is missing of an entry into its folder, where the examples may lie already."""
    items = loaded.items
    if not isinstance(items, StoredExamples):
        with ExampleWriter[T](folder / "shard_0") as writer:
            for number, item in enumerate(items):
                writer.add(number, item)
        items = StoredExamples[T].opened(folder)
    files = {str(path.relative_to(folder)): _digest(path) for path in folder.rglob("*") if path.is_file()}
    meta = _Meta(files, loaded.report, loaded.portions, items.digest, items.vocabulary)
    text = TypeAdapter(_Meta).dump_json(meta)
    (folder / _META).write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def read_entry[T: Example](entry: Path) -> Loaded[T] | None:
    """The examples of an entry; None: there is none, or not as it was written."""
    if not (entry / _META).is_file():
        return None
    own, _, text = (entry / _META).read_bytes().partition(b"\n")
    if own.decode(errors="replace") != hashlib.sha256(text).hexdigest():
        return None
    meta = TypeAdapter(_Meta).validate_json(text)
    if any(
        not (entry / name).is_file() or _digest(entry / name) != sum_ for name, sum_ in meta.files.items()
    ):
        return None
    items = StoredExamples[T].opened(entry, (meta.digest, meta.vocabulary))
    return Loaded(items, meta.report, meta.portions)


def _digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
