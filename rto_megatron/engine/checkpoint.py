"""Checkpoints: torch_dist shards, any layout to any layout; never overwritten, and read only when they are whole."""

from collections.abc import Mapping
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from rto_megatron.engine.absent import AbsentModel, RoleModel
from rto_megatron.engine.expert_state import with_experts_apart
from rto_megatron.engine.integrity import CheckpointError, require_intact
from rto_megatron.engine.megatron import FrozenModel, Model, TrainedModel
from rto_megatron.engine.optimizer import step_at_once
from rto_megatron.engine.plain_values import plain_state, plain_text
from rto_megatron.engine.presence import require_present
from rto_megatron.engine.saving import Saving
from rto_megatron.engine.weights import random_reader
from rto_megatron.errors import UserError
from rto_megatron.parallel.collectives import Json
from rto_megatron.platform.safe_metadata import safe_reading
from rto_megatron.storage.file_digests import WEIGHTS

# The optimizer state is keyed by parameter, so that it loads into any data-parallel size.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
_NORM_STATE = "norm._extra_state"


def _model_shards(model: Model) -> ShardedStateDict:
    """By number of the chunk and by name; a file knows neither, but places in the whole model."""
    metadata = {**_METADATA, "dp_cp_group": model.topology.groups.dp_cp}
    chunks = enumerate(model.module.chunks)
    return {str(number): _shards_of(chunk.sharded_state_dict(metadata=metadata)) for number, chunk in chunks}


def _shards_of(shards: ShardedStateDict) -> ShardedStateDict:
    # Of TransformerEngine's norms, and empty: torch's have none, and a checkpoint is that of either.
    return {name: shard for name, shard in shards.items() if not name.endswith(_NORM_STATE)}


def _fill(model: Model, loaded: ShardedStateDict) -> None:
    for number, chunk in enumerate(model.module.chunks):
        unsaved = {name: None for name in chunk.state_dict() if name.endswith(_NORM_STATE)}
        chunk.load_state_dict({**unsaved, **loaded[str(number)]})


def _whole_state(model: Model, is_loading: bool) -> ShardedStateDict:
    """All of a model that this rank holds; the ranks that hold it must call it."""
    shards = _model_shards(model)
    if isinstance(model, FrozenModel):
        return {"model": shards}
    optimizer = model.optimizer.sharded_state_dict(shards, is_loading=is_loading, metadata=_METADATA)
    return {"model": shards, "optimizer": optimizer}


def _saved_state(model: RoleModel) -> ShardedStateDict:
    """What this rank brings to a save of a model; all ranks must call it."""
    if isinstance(model, AbsentModel):
        return plain_state(model.topology.heard("", str))
    state = _whole_state(model, is_loading=False)
    if model.topology.following.num_followers:
        model.topology.heard(plain_text(state), str)
    return state


def begin_save(
    run_dir: Path,
    step: int,
    models: Mapping[str, RoleModel],
    hf_folders: dict[str, Path],
    state: Json,
    keep: int,
    texts: Mapping[str, str] | None = None,
) -> Saving:
    """Prepares <run_dir>/checkpoints/step_<step>, which stands when `finish` of what is returned has returned.

    All ranks must call it.

    Args:
        models: role -> model; weights are saved, and the optimizer of a trained one.
        hf_folders: role -> folder with config.json and tokenizer, copied in.
        state: whatever else a resume needs, as JSON.
        keep: how many checkpoints stay; older ones are removed after this one stands.
        texts: name -> contents of files beside the state, on the lead; None: there are none.

    Raises:
        CheckpointError: on every rank; the checkpoint exists already, or there is no room for it.
    """
    for role, model in models.items():
        if not isinstance(model, AbsentModel):
            require_present(model.module.parameters(), f"weights of {role}")
    saving = Saving(run_dir, step, keep, next(iter(models.values())).topology)
    saving.prepare({role: hf_folders[role] for role in models}, state, texts or {})
    saving.plan({role: _saved_state(model) for role, model in models.items()})
    return saving


def load_weights(path: Path, model: RoleModel, fresh_head_seed: int | None = None) -> None:
    """Fills a model's parameters from <checkpoint>/<role>, written at any layout; all ranks must call it.

    Args:
        fresh_head_seed: the checkpoint is a language model's; draw the scalar head from this seed instead.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    if isinstance(model, AbsentModel):
        require_intact(path, model.topology)
        _load(path, {})
        return
    shards = _model_shards(model)
    if fresh_head_seed is not None:
        shards = {
            number: {key: shard for key, shard in chunk.items() if not key.startswith("output_layer.")}
            for number, chunk in shards.items()
        }
    require_intact(path, model.topology)
    loaded = _load(path, {"model": shards})["model"]
    if fresh_head_seed is not None and model.topology.is_last_stage:
        head = random_reader(fresh_head_seed, 0.0)("score.weight", (1, model.shape.hidden_size))
        loaded[str(len(loaded) - 1)]["output_layer.weight"] = head
    _fill(model, loaded)


def load_state(path: Path, model: RoleModel) -> None:
    """Fills parameters, and optimizer state of a trained model, from <checkpoint>/<role>; all ranks must call it.

    Raises:
        CheckpointError: as `load_weights`.
    """
    require_intact(path, model.topology)
    restore(path, model)


def restore(path: Path, model: RoleModel) -> None:
    """Does what `load_state` does, with a checkpoint that was found whole before."""
    if isinstance(model, AbsentModel):
        _load(path, {})
        return
    loaded = _load(path, _whole_state(model, is_loading=True))
    _fill(model, loaded["model"])
    if isinstance(model, TrainedModel):
        model.optimizer.load_state_dict(with_experts_apart(loaded["optimizer"], model.optimizer))
        step_at_once(model.optimizer)


def _load(folder: Path, shards: ShardedStateDict) -> ShardedStateDict:
    path = folder / WEIGHTS
    try:
        with safe_reading(path):
            return dist_checkpointing.load(shards, str(path))
    except UserError:
        raise
    except (CheckpointingException, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be loaded: {error}. It is damaged or of another model; "
            f"name an older one, or remove it and start again"
        ) from error
