"""Finds the checkpoint that a run goes on from: the newest, proved whole, or an error that says what was lost."""

import json
from dataclasses import dataclass
from pathlib import Path

from rto_megatron.engine.integrity import SAVING_ERRORS, CheckpointError, write_error
from rto_megatron.engine.saving import point_to
from rto_megatron.parallel.collectives import Json
from rto_megatron.parallel.topology import Topology
from rto_megatron.storage.checkpoints import (
    CHECKPOINTS,
    POINTER,
    STATE,
    finished_checkpoints,
    is_step_name,
    pointed_name,
    pointer_problem,
)
from rto_megatron.storage.file_digests import checkpoint_problem

DAMAGED = "damaged_"  # <run>/checkpoints/damaged_step_<step>: what a resume from an older one set aside


@dataclass(frozen=True)
class Found:
    """A checkpoint all of whose files are those that were saved.

    Example:
        for warning in found.warnings: print(warning)
    """

    path: Path
    state: dict[str, Json]
    warnings: tuple[str, ...]  # what was wrong beside it, for the user


@dataclass(frozen=True)
class _Listed:
    """What the lead sees below <run>/checkpoints; another rank may see it later."""

    lost: str | None  # what is wrong with the pointer
    pointed: str | None
    names: tuple[str, ...]  # the newest first


def _list(run_dir: Path) -> _Listed:
    names = tuple(path.name for path in reversed(finished_checkpoints(run_dir)))
    return _Listed(pointer_problem(run_dir), pointed_name(run_dir), names)


def find_valid(run_dir: Path, topology: Topology, takes_older: bool) -> Found | None:
    """The newest checkpoint, read through once; None for a fresh run. All ranks must call it.

    Args:
        takes_older: where the newest is damaged or gone, set it aside and take the last valid one.

    Raises:
        CheckpointError: on every rank; it is damaged or gone (and nothing older may be taken), or none is valid.
    """
    listed = topology.lead_value(_list(run_dir), _Listed)
    problems = [] if listed.lost is None else [listed.lost]
    if not listed.names and not problems:
        return None
    checkpoints = [run_dir / CHECKPOINTS / name for name in listed.names]
    for path in checkpoints:
        own = checkpoint_problem(path, topology.rank, topology.world_size)
        found = topology.gather_all([] if own is None else [own], list[str])
        if not any(found):
            break
        problems.append(next(problem for part in found for problem in part))
    else:
        told = "\n".join(problems)
        raise CheckpointError(
            f"{told}\nno checkpoint in {run_dir} is whole; name another run.dir to start again"
        )
    if problems and not takes_older:
        raise CheckpointError(
            f"{problems[0]}\nThe newest whole checkpoint of {run_dir} is {path.name}. Put back what is damaged, "
            "or set run.resume_from_older=true to go on from that one: later steps are trained again, and damaged "
            "folders are kept under another name"
        )
    if problems:
        problems.append(f"the run goes on from {path.name}: later steps are trained again")
        _set_aside(checkpoints[: checkpoints.index(path)], path, topology)
    elif listed.pointed is not None and not is_step_name(listed.pointed):
        # It is written whole, so this is damage; but the newest checkpoint was found without it.
        problems.append(
            f"{run_dir / CHECKPOINTS / POINTER} is damaged, it holds {listed.pointed!r}; {path.name} is the newest"
        )
    return Found(path, json.loads((path / STATE).read_text()), tuple(problems))


def _set_aside(damaged: list[Path], valid: Path, topology: Topology) -> None:
    error = None
    if topology.is_lead:
        try:
            for path in damaged:
                number = sum(1 for _ in path.parent.glob(f"{DAMAGED}{path.name}*"))
                path.rename(path.with_name(f"{DAMAGED}{path.name}" + (f"_{number}" if number else "")))
            point_to(valid)
        except OSError as failure:
            error = write_error(failure, valid, 0)
    topology.raise_together(error, *SAVING_ERRORS)
