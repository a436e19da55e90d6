"""Proof that a checkpoint's files are those that were written: torch_dist itself loads flipped bits in silence."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

WEIGHTS = "weights"  # <checkpoint>/<role>/weights: torch_dist
DIGESTS = "digests.json"  # <checkpoint>/<role>/digests.json: file of weights/ -> sha256
_REMEDY = "it is damaged; name an older checkpoint, or remove this one and start again"


def file_digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """sha256 of files of `folder`/weights."""
    digests = {}
    for name in names:
        with (folder / WEIGHTS / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def first_problem(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Compares this rank's share of the files with digests.json; what is missing, cut short or changed, if anything."""
    path = folder / DIGESTS
    try:
        expected = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        return f"{path} is missing or damaged ({error}); {_REMEDY}"
    try:
        found = file_digests(folder, sorted(expected)[rank::world_size])
    except FileNotFoundError as error:
        return f"{error.filename} is missing; {_REMEDY}"
    changed = [name for name, digest in found.items() if digest != expected[name]]
    return f"{folder / WEIGHTS / changed[0]} is not the file that was saved; {_REMEDY}" if changed else None
