"""Proof that a checkpoint's files are those that were written: torch_dist itself loads flipped bits in silence."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from rto_megatron.platform.patience import patiently
from rto_megatron.storage.ownership import ownership_problem

WEIGHTS = "weights"  # <checkpoint>/<role>/weights: torch_dist
MANIFEST = "manifest.json"  # <checkpoint>/manifest.json: the step, and size and sha256 of every other file
_REMEDY = "it is damaged; name an older checkpoint, or remove this one and start again"


def checkpoint_name(step: int) -> str:
    """The folder of a step, below a run's `checkpoints`."""
    return f"step_{step:06d}"


@dataclass(frozen=True)
class FileDigest:
    """What a file must be.

    Example:
        FileDigest(size=4, sha256=hashlib.sha256(b"text").hexdigest())
    """

    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint must be.

    Example:
        CheckpointManifest(step=100, files={"config.json": digest}).to_json()
    """

    step: int
    files: dict[str, FileDigest]  # by path below the checkpoint

    def to_json(self) -> str:
        """The text of the manifest file."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)


def file_digests(checkpoint: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Size and sha256 of files, by path below `checkpoint`."""
    digests = {}
    for name in names:
        with (checkpoint / name).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            digests[name] = FileDigest(file.tell(), sha256)
    return digests


def file_names(checkpoint: Path) -> list[str]:
    """Every file below `checkpoint` but the manifest."""
    paths = (path for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for path in paths if (name := path.relative_to(checkpoint).as_posix()) != MANIFEST)


def first_problem(role: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Compares this rank's share of the files of <checkpoint>/<role> with the checkpoint's manifest.

    Returns:
        what is missing, cut short or changed, if anything.
    """
    return _first_problem(role.parent, f"{role.name}/", rank, world_size)


def checkpoint_problem(checkpoint: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Finds what `first_problem` does in all files; and the step must be that of the folder's name."""
    return _first_problem(checkpoint, "", rank, world_size)


def _first_problem(checkpoint: Path, prefix: str, rank: int, world_size: int) -> str | None:
    path = checkpoint / MANIFEST
    try:
        # One rank looks for all, who hear of it before anything is loaded: there may be thousands of files.
        if rank == 0 and (problem := ownership_problem(checkpoint)) is not None:
            return problem
        manifest = patiently(_read, path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{path} is missing or damaged ({type(error).__name__}: {error}); {_REMEDY}"
    if checkpoint.name.startswith("step_") and checkpoint.name != checkpoint_name(manifest.step):
        return f"{path} is of step {manifest.step}; {_REMEDY}"
    expected = {name: digest for name, digest in manifest.files.items() if name.startswith(prefix)}
    if not expected:
        return f"{path} names no file of {checkpoint / prefix}; {_REMEDY}"
    try:
        return patiently(_first_difference, checkpoint, expected, sorted(expected)[rank::world_size])
    except OSError as error:
        return f"{error.filename} is missing or cannot be read ({error.strerror}); {_REMEDY}"


def _first_difference(checkpoint: Path, expected: dict[str, FileDigest], names: list[str]) -> str | None:
    for name in names:  # all sizes before the first byte: most damage is found at once
        size = (checkpoint / name).stat().st_size
        if size != expected[name].size:
            return f"{checkpoint / name} has {size} bytes, {expected[name].size} were saved; {_REMEDY}"
    for name in names:
        if file_digests(checkpoint, [name])[name] != expected[name]:
            return f"{checkpoint / name} is not the file that was saved; {_REMEDY}"
    return None


def _read(path: Path) -> CheckpointManifest:
    content = json.loads(path.read_text())
    files = {
        str(name): FileDigest(int(entry["size"]), str(entry["sha256"]))
        for name, entry in content["files"].items()
    }
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"it names {name}, outside of the checkpoint")
    return CheckpointManifest(int(content["step"]), files)
