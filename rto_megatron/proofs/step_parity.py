"""One step of a stage at any layout against the same step on one rank: what became of every tensor."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from rto_megatron.config import schema
from rto_megatron.config.facts import facts_of
from rto_megatron.engine.build_roles import place_frozen
from rto_megatron.engine.export import export_hf
from rto_megatron.engine.source import find_source
from rto_megatron.parallel.topology import Topology
from rto_megatron.proofs.resumed_runs import train_scripted

CRITIC_EXPORT = "critic_hf"  # <run>/critic_hf, beside what the run itself exports


@dataclass(frozen=True)
class WorstTensor:
    """The tensor of a model in which two runs are the furthest apart.

    Example:
        WorstTensor("model.norm.weight", apart=1e-7, moved=4e-3).apart
    """

    name: str
    apart: float  # norm of the difference, over that of what the step changed in it on one rank
    moved: float  # the least that any tensor of the model was changed, over its norm


def train_and_export(config: schema.TrainStage, topology: Topology) -> None:
    """Trains as one rank, with scripted responses, and exports the critic too; all ranks must call it."""
    train_scripted(config, topology)
    if facts_of(config).critic_optimizer is None:
        return
    source = find_source(config.run.dir, has_scalar_head=True, is_random=False, key="run.dir")
    critic = place_frozen("critic", source, True, config.precision, topology.of("critic"))
    export_hf(critic, source.hf_folder, config.run.dir / CRITIC_EXPORT)


def trained_tensors(run_dir: Path) -> dict[str, dict[str, Tensor]]:
    """Whole tensors by Hugging Face name, of the policy (or the reward model in training) and of the critic."""
    exports = {"policy": run_dir / "hf", "critic": run_dir / CRITIC_EXPORT}
    return {role: _tensors(folder) for role, folder in exports.items() if folder.is_dir()}


def worst_tensors(start: Mapping[str, Path], one: Path, other: Path) -> dict[str, WorstTensor]:
    """How far a run is from the one on a single rank, by model.

    Args:
        start: role -> folder with the weights that both began with; a tensor that is not there began at 0.
        one, other: run folders, of the single rank and of a layout.
    """
    want, got = trained_tensors(one), trained_tensors(other)
    found = {}
    for role, tensors in want.items():
        before, after = _tensors(start[role]), got[role]
        changes = {name: tensor - before.get(name, 0.0) for name, tensor in tensors.items()}
        apart = {name: _ratio(after[name] - tensors[name], change) for name, change in changes.items()}
        worst = max(apart, key=lambda name: apart[name])
        moved = min(_ratio(change, tensors[name]) for name, change in changes.items())
        found[role] = WorstTensor(worst, apart[worst], moved)
    return found


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def _ratio(part: Tensor, whole: Tensor) -> float:
    """NaN is as far away as can be."""
    ratio = float(part.double().norm() / whole.double().norm())
    return ratio if math.isfinite(ratio) else math.inf
