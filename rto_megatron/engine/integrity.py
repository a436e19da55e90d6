"""Proof that a checkpoint's files are those that were written: torch_dist itself loads flipped bits in silence."""

import hashlib
import json
from pathlib import Path

from rto_megatron.engine.source import WEIGHTS
from rto_megatron.parallel.collectives import Json
from rto_megatron.parallel.topology import Topology

DIGESTS = "digests.json"  # <checkpoint>/<role>/digests.json: file of weights/ -> sha256
_REMEDY = "it is damaged; name an older checkpoint, or remove this one and start again"


def write_digests(folder: Path, topology: Topology) -> None:
    """Writes `folder`/digests.json over `folder`/weights; all ranks must call it, when all files are written."""
    topology.barrier()
    names = sorted(path.name for path in (folder / WEIGHTS).iterdir())
    parts = topology.gather_all_json(_digests(folder, names, topology))
    if topology.is_lead:
        whole = {name: digest for part in parts if isinstance(part, dict) for name, digest in part.items()}
        (folder / DIGESTS).write_text(json.dumps(whole, indent=1))


def require_intact(folder: Path, topology: Topology) -> None:
    """Reads every file of `folder`/weights once, shared out over the ranks; all ranks must call it.

    Raises:
        UserError: on every rank, when a file is missing, cut short or changed; names it.
    """
    topology.raise_together(_first_problem(folder, topology))


def _first_problem(folder: Path, topology: Topology) -> str | None:
    path = folder / DIGESTS
    try:
        expected = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        return f"{path} is missing or damaged ({error}); {_REMEDY}"
    try:
        found = _digests(folder, sorted(expected), topology)
    except FileNotFoundError as error:
        return f"{error.filename} is missing; {_REMEDY}"
    changed = [name for name, digest in found.items() if digest != expected[name]]
    return f"{folder / WEIGHTS / changed[0]} is not the file that was saved; {_REMEDY}" if changed else None


def _digests(folder: Path, names: list[str], topology: Topology) -> dict[str, Json]:
    """This rank's share of the files."""
    digests: dict[str, Json] = {}
    for name in names[topology.rank :: topology.world_size]:
        with (folder / WEIGHTS / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
