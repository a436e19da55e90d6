"""Checkpoints whose parameters all hold the number of their step, and what a run finds of them."""

from pathlib import Path

import torch
from engine.layouts import topology, trained
from ranks import run_ranks

from rto_megatron.config.training import OptimizerConfig
from rto_megatron.engine.checkpoint import begin_save
from rto_megatron.engine.integrity import CheckpointError
from rto_megatron.engine.recovery import find_valid
from rto_megatron.parallel.topology import Topology

ADAM = OptimizerConfig(lr=1e-3)


def save_steps(
    place: Topology, model_folder: Path, run_dir: Path, steps: tuple[int, ...], keep: int = 2
) -> None:
    model = trained(place, model_folder, False, ADAM)
    for step in steps:
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.fill_(float(step))
        begin_save(run_dir, step, {"policy": model}, {"policy": model_folder}, {"step": step}, keep).finish()


def save_ending(layout: str, model_folder: Path, run_dir: Path, steps: tuple[int, ...]) -> str:
    """The kind and text of the error that ended the save."""
    try:
        save_steps(topology(layout), model_folder, run_dir, steps)
    except CheckpointError as error:
        return f"{type(error).__name__} {error.reason}: {error}"
    return "saved"


def _found(run_dir: Path, takes_older: bool = False) -> tuple[str | None, tuple[str, ...]]:
    """The step and what was lost; or None and the error."""
    try:
        found = find_valid(run_dir, topology("dp2"), takes_older)
    except CheckpointError as error:
        return None, (str(error),)
    return (found.path.name, found.warnings) if found else (None, ())


def found_by_both(run_dir: Path, takes_older: bool = False) -> tuple[str | None, tuple[str, ...]]:
    first, second = run_ranks(2, _found, run_dir, takes_older)
    assert first == second
    return first


def checkpoint_names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def file_contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
