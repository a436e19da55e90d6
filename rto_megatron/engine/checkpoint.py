"""Checkpoints: torch_dist shards, any layout to any layout; written aside, then renamed, never overwritten."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from rto_megatron.engine.integrity import require_intact, write_digests
from rto_megatron.engine.megatron import FrozenModel, Model, TrainedModel
from rto_megatron.engine.source import CHECKPOINTS, latest_checkpoint
from rto_megatron.engine.weights import random_reader
from rto_megatron.errors import UserError
from rto_megatron.parallel.collectives import Json
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.safe_metadata import safe_reading
from rto_megatron.storage.file_digests import WEIGHTS
from rto_megatron.storage.megatron_folder import HF_FILES

STATE = "state.json"
# The optimizer state is keyed by parameter, so that it loads into any data-parallel size.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def _model_shards(model: Model) -> ShardedStateDict:
    metadata = {**_METADATA, "dp_cp_group": model.topology.data_group()}
    return model.module.sharded_state_dict(metadata=metadata)


def _whole_state(model: Model, is_loading: bool) -> ShardedStateDict:
    shards = _model_shards(model)
    if isinstance(model, FrozenModel):
        return {"model": shards}
    optimizer = model.optimizer.sharded_state_dict(shards, is_loading=is_loading, metadata=_METADATA)
    return {"model": shards, "optimizer": optimizer}


def save_checkpoint(
    run_dir: Path,
    step: int,
    models: Mapping[str, Model],
    hf_folders: dict[str, Path],
    state: Json,
    keep: int,
) -> Path:
    """Writes <run_dir>/checkpoints/step_<step>; all ranks must call it.

    Args:
        models: role -> model; weights are saved, and the optimizer of a trained one.
        hf_folders: role -> folder with config.json and tokenizer, copied in.
        state: whatever else a resume needs, as JSON.
        keep: how many checkpoints stay; older ones are removed after this one stands.

    Raises:
        UserError: on every rank, when the checkpoint exists already.
    """
    topology = next(iter(models.values())).topology
    final = run_dir / CHECKPOINTS / f"step_{step:06d}"
    if final.exists():
        raise UserError(
            f"{final} exists already, and a checkpoint is never overwritten; name another run.dir"
        )
    partial = final.with_name(f".partial_{final.name}")
    if topology.is_lead:
        shutil.rmtree(partial, ignore_errors=True)
        for role in models:
            (partial / role / WEIGHTS).mkdir(parents=True)
            shutil.copytree(
                hf_folders[role], partial / role / HF_FILES, ignore=shutil.ignore_patterns("*.safetensors*")
            )
    topology.barrier()
    for role, model in models.items():
        dist_checkpointing.save(
            _whole_state(model, is_loading=False),
            str(partial / role / WEIGHTS),
            TorchDistSaveShardedStrategy(),
        )
        write_digests(partial / role, topology)
    if topology.is_lead:
        _write_synced(partial / STATE, json.dumps(state))
        os.rename(partial, final)
        for old in sorted(final.parent.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    topology.barrier()
    return final


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def load_weights(path: Path, model: Model, fresh_head_seed: int | None = None) -> None:
    """Fills a model's parameters from <checkpoint>/<role>, written at any layout; all ranks must call it.

    Args:
        fresh_head_seed: the checkpoint is a language model's; draw the scalar head from this seed instead.

    Raises:
        UserError: the checkpoint is damaged or of another model.
    """
    shards = _model_shards(model)
    if fresh_head_seed is not None:
        shards = {key: shard for key, shard in shards.items() if not key.startswith("output_layer.")}
    loaded = _load(path, {"model": shards}, model.topology)["model"]
    if fresh_head_seed is not None and model.topology.is_last_stage:
        loaded["output_layer.weight"] = random_reader(fresh_head_seed, 0.0)(
            "score.weight", (1, model.shape.hidden_size)
        )
    model.module.load_state_dict(loaded)


def load_state(path: Path, model: Model) -> None:
    """Fills parameters, and optimizer state of a trained model, from <checkpoint>/<role>; all ranks must call it.

    Raises:
        UserError: as `load_weights`.
    """
    loaded = _load(path, _whole_state(model, is_loading=True), model.topology)
    model.module.load_state_dict(loaded["model"])
    if isinstance(model, TrainedModel):
        model.optimizer.load_state_dict(loaded["optimizer"])


def _load(folder: Path, shards: ShardedStateDict, topology: Topology) -> ShardedStateDict:
    require_intact(folder, topology)
    path = folder / WEIGHTS
    try:
        with safe_reading(path):
            return dist_checkpointing.load(shards, str(path))
    except UserError:
        raise
    except (CheckpointingException, FileNotFoundError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"the checkpoint {path} cannot be loaded: {error}. It is damaged or of another model; "
            f"name an older one, or remove it and start again"
        ) from error


def read_state(run_dir: Path) -> tuple[Path, dict[str, Json]] | None:
    """The newest checkpoint and its state, or None for a fresh run.

    Raises:
        UserError: the state file is missing or truncated.
    """
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        return None
    try:
        return checkpoint, json.loads((checkpoint / STATE).read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(
            f"{checkpoint / STATE} is missing or damaged ({error}); remove {checkpoint} to resume from the one before"
        ) from error
