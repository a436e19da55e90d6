"""The checkpoints of a run and the roles in one, found by their names alone: no weight is read."""

import re
from collections.abc import Sequence
from pathlib import Path

from rto_megatron.storage.file_digests import WEIGHTS

CHECKPOINTS = "checkpoints"
STATE = "state.json"  # of a checkpoint: its step, its configuration, where its data and generators were
POINTER = "latest"  # <run>/checkpoints/latest: the name of the newest finished checkpoint
LANGUAGE_ROLES = ("policy_ema", "policy")  # where a run keeps an average of the policy, that is its result
SCALAR_ROLES = ("reward", "critic")


def checkpoint_of(path: Path) -> Path | None:
    """The newest finished checkpoint where `path` is a run folder, else `path` itself; None: the run has none yet."""
    return latest_checkpoint(path) if (path / CHECKPOINTS).is_dir() else path


def find_role(path: Path, roles: Sequence[str]) -> Path | None:
    """The folder of a model in a run's newest checkpoint, or in one checkpoint.

    Args:
        path: a run folder or a checkpoint.
        roles: the first that is there counts.

    Returns:
        <checkpoint>/<role>, with its weights; None: the checkpoint has none of `roles`, or there is none.
    """
    checkpoint = checkpoint_of(path)
    if checkpoint is None:
        return None
    return next((checkpoint / role for role in roles if (checkpoint / role / WEIGHTS).is_dir()), None)


def finished_checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first; unfinished ones are never under a final name."""
    folders = (run_dir / CHECKPOINTS).glob("step_*")
    return sorted((f for f in folders if is_step_name(f.name)), key=step_of)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest finished checkpoint of a run."""
    folders = finished_checkpoints(run_dir)
    return folders[-1] if folders else None


def pointer_problem(run_dir: Path) -> str | None:
    """Whether the pointer names a checkpoint that is newer than all there are: one that stood and is gone."""
    pointer, name, newest = run_dir / CHECKPOINTS / POINTER, pointed_name(run_dir), latest_checkpoint(run_dir)
    if name is None:
        return None
    if newest is None:
        return f"{pointer} holds {name!r}, and no checkpoint is beside it; one stood there before"
    if is_step_name(name) and step_of(newest) < step_of(Path(name)):
        return f"{pointer} names {name}, which is missing; the newest there is {newest.name}"
    return None


def pointed_name(run_dir: Path) -> str | None:
    """What the pointer holds; None where there is none, as before the end of the first save."""
    try:
        return (run_dir / CHECKPOINTS / POINTER).read_text().strip()
    except FileNotFoundError:
        return None


def is_step_name(name: str) -> bool:
    """Whether a checkpoint can have this name."""
    return re.fullmatch(r"step_\d{6,}", name) is not None


def step_of(checkpoint: Path) -> int:
    """Finished steps of the run when the checkpoint was written, by its name."""
    return int(checkpoint.name.removeprefix("step_"))
