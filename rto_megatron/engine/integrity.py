"""The proof of `storage.file_digests`, written and checked by all ranks, each its share of the files."""

import json
from pathlib import Path

from rto_megatron.parallel.topology import Topology
from rto_megatron.storage.file_digests import DIGESTS, WEIGHTS, file_digests, first_problem


def write_digests(folder: Path, topology: Topology) -> None:
    """Writes `folder`/digests.json over `folder`/weights; all ranks must call it, when all files are written."""
    topology.barrier()
    names = sorted(path.name for path in (folder / WEIGHTS).iterdir())
    own = file_digests(folder, names[topology.rank :: topology.world_size])
    parts = topology.gather_all_json(dict(own))
    if topology.is_lead:
        whole = {name: digest for part in parts if isinstance(part, dict) for name, digest in part.items()}
        (folder / DIGESTS).write_text(json.dumps(whole, indent=1))


def require_intact(folder: Path, topology: Topology) -> None:
    """Reads every file of `folder`/weights once, shared out over the ranks; all ranks must call it.

    Raises:
        UserError: on every rank, when a file is missing, cut short or changed; names it.
    """
    topology.raise_together(first_problem(folder, topology.rank, topology.world_size))
