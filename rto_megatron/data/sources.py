"""What a name of the configuration stands for, and the rows behind it."""

import hashlib
import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from rto_megatron.config.source_names import SUFFIXES, HubSet, hub_set, is_pattern
from rto_megatron.data.file_kinds import require_kind
from rto_megatron.data.file_rows import file_rows
from rto_megatron.data.row import BadRow, Row, checked
from rto_megatron.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

# Names of parts of a set, of which a folder often holds several.
_SPLITS = re.compile(r"(?:^|[^a-z])(train|test|valid|validation|val|dev|eval)(?:[^a-z]|$)", re.IGNORECASE)
_FORMS = (
    f"a file ending in {', '.join(SUFFIXES)}, a folder or pattern of such files (data/*.jsonl), or a hub data set "
    "written as owner/name:split or owner/name:config:split"
)


def read_rows(source: str) -> Iterator[Row]:
    """Reads as `scan_rows` does, up to the first row that cannot be read.

    Raises:
        DataError: as `scan_rows`, or names that row.
    """
    for row in scan_rows(source):
        if isinstance(row, BadRow):
            raise DataError(f"{row.where}: {row.problem}")
        yield row


def scan_rows(source: str) -> Iterator[Row | BadRow]:
    """Rows of a local file, of all files of a folder or pattern in the order of their names, or of the hub.

    A name that exists on this machine is that file or folder, whatever else it could mean.

    Raises:
        DataError: there is nothing of that name, or a file is empty, damaged, cut short or of another kind than its
            name says.
    """
    files = local_files(source)
    if files is not None:
        for path in files:
            yield from file_rows(path)
        return
    named = hub_set(source)
    if named is None:
        raise DataError(f"data source {source!r} is neither {_FORMS}")
    yield from _hub(source, named)


def local_files(source: str) -> list[Path] | None:
    """The files of a source of this machine; None: it is none by its name.

    Raises:
        DataError: they are not there, or the folder does not say which of its files are meant.
    """
    path = Path(source)
    if path.is_dir():
        return _of_folder(path)
    if path.exists():
        return [_readable(path)]
    if is_pattern(source):
        found = sorted(Path(name) for name in glob(source, recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(f"no data file matches {source} (working directory {Path.cwd()})")
        return [_readable(path) for path in found]
    if not source.endswith(SUFFIXES):
        return None
    raise DataError(f"data file {source} does not exist (working directory {Path.cwd()})")


def size_of(source: str) -> int:
    """Bytes of a source's files; 0 where they cannot be told."""
    files = local_files(source)
    return 0 if files is None else sum(path.stat().st_size for path in files)


def state_of(source: str) -> list[str] | None:
    """What tells the contents of a source from others; None: nothing does.

    Raises:
        DataError: as `scan_rows`.
    """
    files = local_files(source)
    if files is not None:
        for path in files:
            require_kind(path)
        return [f"{path} {_digest(path)}" for path in files]
    named = hub_set(source)
    stored = [] if named is None else _table(named).cache_files
    found = [(entry["filename"], Path(entry["filename"]).stat()) for entry in stored]
    return [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in found] or None


def _digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _readable(path: Path) -> Path:
    if not path.name.endswith(SUFFIXES):
        raise DataError(
            f"{path} has no ending of a data file ({', '.join(SUFFIXES)}); rename it or name another file"
        )
    return path


def _of_folder(folder: Path) -> list[Path]:
    names = sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith(SUFFIXES))
    files = [path for path in names if not path.name.startswith(".")]
    if (folder / "dataset_dict.json").is_file() or any(folder.glob("*.arrow")):
        raise DataError(
            f"the folder {folder} is what save_to_disk of datasets writes, whose Arrow files are not read; write every "
            "split of it with Dataset.to_parquet(FILE), and name that file"
        )
    if not files:
        deeper = next((p for p in folder.glob("*/*") if p.name.endswith(SUFFIXES)), None)
        hint = f"; {deeper.parent} has some" if deeper else ""
        raise DataError(f"the folder {folder} holds no file ending in {', '.join(SUFFIXES)}{hint}")
    splits = {match[1].lower() for path in files if (match := _SPLITS.search(path.name))}
    if len(splits) > 1:
        raise DataError(
            f"the folder {folder} holds files of several parts of a set ({', '.join(sorted(splits))}): "
            f"{', '.join(path.name for path in files[:6])}; name one file, or a pattern such as {folder}/train*"
        )
    return files


def _hub(source: str, named: HubSet) -> Iterator[Row | BadRow]:
    for number, columns in enumerate(_table(named), start=1):
        yield checked(f"{source} row {number}", columns)


def _table(named: HubSet) -> "Dataset":
    # Imported here because it takes seconds and local files do not need it.
    import datasets

    try:
        return datasets.load_dataset(named.name, named.config, split=named.split)
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        # What is wrong is its cause.
        is_unsaid = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = " ".join(str(error.__cause__ if is_unsaid and error.__cause__ else error).split())
        raise DataError(
            f"data set {named.name!r}, {'' if named.config is None else f'config {named.config!r}, '}split "
            f"{named.split!r}, could not be loaded from the hub ({reason}); check these names and the network, or give "
            "a local file"
        ) from error
