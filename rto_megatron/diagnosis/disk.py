"""The run's folder: can be written, has room for the checkpoints, and holds whole ones."""

import shutil
import tempfile
from pathlib import Path

from rto_megatron.config.facts import facts_of
from rto_megatron.config.roles import roles_of
from rto_megatron.config.schema import Stage
from rto_megatron.diagnosis.finding import Finding
from rto_megatron.planning.memory import checkpoint_bytes, gib
from rto_megatron.planning.shapes import find_shape
from rto_megatron.storage.checkpoints import finished_checkpoints, pointer_problem
from rto_megatron.storage.file_digests import checkpoint_problem


def _nearest(run_dir: Path) -> Path:
    """The folder, or the first one above it that exists."""
    return next(path for path in (run_dir, *run_dir.parents) if path.exists())


def check_writable(run_dir: Path) -> list[Finding]:
    """Writes a file that goes away at once, into the folder or the nearest one above it that exists."""
    folder = _nearest(run_dir)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"rto doctor")
            file.flush()
    except OSError as error:
        found = f"{folder} cannot be written: {error.strerror}"
        why = "checkpoints, metrics and exports go there"
        return [
            Finding("run folder", "problem", found, why, "run.dir=<a folder on a disk that you may write>")
        ]
    return [Finding("run folder", "ok", f"{folder} can be written")]


def check_space(config: Stage) -> list[Finding]:
    """Free space against what the stage will keep, and one more: the oldest goes when the next stands."""
    training = facts_of(config).training
    if training is None:
        return []
    folder = _nearest(config.run.dir)
    free = shutil.disk_usage(folder).free
    found = {
        role.name: find_shape(role.path, None, role.found_as) for role in roles_of(config) if role.is_trained
    }
    shapes = {name: shape for name, shape in found.items() if shape is not None}
    if len(shapes) < len(found):
        unknown = ", ".join(f"models.{name}" for name in found if name not in shapes)
        return [Finding("disk", "ok", f"{gib(free)} free; needed is unknown, as {unknown} is not here yet")]
    one = checkpoint_bytes(training, shapes)
    still_to_come = max(1, training.run.keep_checkpoints + 1 - len(finished_checkpoints(config.run.dir)))
    needed = one * still_to_come
    sizes = f"{gib(free)} free on the disk of {folder}; {still_to_come} checkpoints of {gib(one)} are to come"
    if free < needed:
        why = "a run that fills its disk stops at a checkpoint, hours into it"
        fix = f"free {gib(needed - free)}, name another run.dir, or lower run.keep_checkpoints"
        return [Finding("disk", "problem", sizes, why, fix)]
    return [Finding("disk", "ok", sizes)]


def check_checkpoints(run_dir: Path, rank: int = 0, world_size: int = 1) -> list[Finding]:
    """Reads every file of the run's checkpoints once and compares it with the manifest; and the pointer.

    Args:
        rank: this rank, which reads its share of the files.
        world_size: all ranks that call it.
    """
    checkpoints = finished_checkpoints(run_dir)
    problems = [
        pointer_problem(run_dir),
        *(checkpoint_problem(path, rank, world_size) for path in checkpoints),
    ]
    why = "a resume refuses a damaged checkpoint"
    fix = "put back what is damaged, or go on from the last whole one: run.resume_from_older=true"
    findings = [Finding("checkpoints", "problem", text, why, fix) for text in problems if text is not None]
    if findings:
        return findings
    whole = (
        f"{len(checkpoints)} in {run_dir}, whole, up to {checkpoints[-1].name}" if checkpoints else "none yet"
    )
    return [Finding("checkpoints", "ok", whole)]
