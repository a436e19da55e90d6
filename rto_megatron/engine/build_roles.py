"""Builds the roles: policy, critic, reference, reward and DPO model, each loaded from where the configuration says."""

import warnings
from pathlib import Path

import torch

from rto_megatron.config.schema import TrainStage
from rto_megatron.config.training import (
    FrozenPrecisionConfig,
    OptimizerConfig,
    PrecisionConfig,
    TrainParallelConfig,
)
from rto_megatron.engine.absent import AbsentModel, FrozenRole, TrainedRole
from rto_megatron.engine.checkpoint import load_weights
from rto_megatron.engine.megatron import FrozenModel, TrainedModel, training_hooks
from rto_megatron.engine.optimizer import build_optimizer, meet_builders, wrap_for_training
from rto_megatron.engine.source import WeightSource
from rto_megatron.engine.weights import (
    hf_reader,
    load_hf_tensors,
    megatron_reader,
    random_reader,
)
from rto_megatron.errors import ModelFolderError, UserError
from rto_megatron.models.build import build_chunks, transformer_config
from rto_megatron.models.families.blocks import EMBEDDING
from rto_megatron.models.fused_layers import plain_name
from rto_megatron.parallel.topology import Topology
from rto_megatron.storage.not_finite import described
from rto_megatron.types import ValueScale

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_frozen(
    name: str,
    source: WeightSource,
    has_scalar_head: bool,
    precision: FrozenPrecisionConfig,
    topology: Topology,
) -> FrozenModel:
    """A loaded model without gradients, on a rank of its layout."""
    shape = source.shape()
    config = transformer_config(
        shape, topology, _DTYPES[precision.dtype], recompute=False, has_scalar_head=has_scalar_head,
        has_fp32_residual="residual" in precision.fp32_parts,
    )  # fmt: skip
    module = build_chunks(shape, config, topology, has_scalar_head)
    module.requires_grad_(False)
    scale = _scale(source, has_scalar_head, is_head_fresh=False)
    has_fp32_head = "head" in precision.fp32_parts
    model = FrozenModel(name, shape, has_scalar_head, scale, module, topology, has_fp32_head)
    _load(model, source, seed=0, is_head_fresh=False)
    return model


def build_trained(
    name: str,
    source: WeightSource,
    has_scalar_head: bool,
    precision: PrecisionConfig,
    optimizer: OptimizerConfig,
    topology: Topology,
    seed: int,
    parallel: TrainParallelConfig,
    is_head_fresh: bool = False,
    moe_aux_loss_coef: float = 0.0,
) -> TrainedModel:
    """A loaded model with gradients and optimizer, on a rank of its layout.

    Args:
        parallel: of it, how replicas share optimizer and gradients; `topology` has the rest.
        is_head_fresh: the source is a language model; draw the scalar head (reward-model training).
        moe_aux_loss_coef: see `transformer_config`.
    """
    shape = source.shape()
    config = transformer_config(
        shape, topology, _DTYPES[precision.dtype], precision.recompute, moe_aux_loss_coef, has_scalar_head,
        "residual" in precision.fp32_parts,
    )  # fmt: skip
    training_hooks(config)
    module = build_chunks(shape, config, topology, has_scalar_head)
    scale = _scale(source, has_scalar_head, is_head_fresh)
    frozen = FrozenModel(name, shape, has_scalar_head, scale, module, topology)
    _load(frozen, source, seed, is_head_fresh)
    wrapped = wrap_for_training(module, parallel, topology)
    built = build_optimizer(wrapped, optimizer, parallel, topology)
    has_fp32_head = "head" in precision.fp32_parts
    return TrainedModel(name, shape, has_scalar_head, scale, module, wrapped, built, topology, has_fp32_head)


def place_frozen(
    name: str,
    source: WeightSource,
    has_scalar_head: bool,
    precision: FrozenPrecisionConfig,
    topology: Topology,
) -> FrozenRole:
    """What `build_frozen` gives, where this rank holds a part of it; all ranks must call it."""
    if topology.holds_shard:
        return build_frozen(name, source, has_scalar_head, precision, topology)
    scale = _scale(source, has_scalar_head, is_head_fresh=False)
    return _absent(name, source, has_scalar_head, precision, topology, scale)


def place_trained(
    config: TrainStage,
    name: str,
    source: WeightSource,
    has_scalar_head: bool,
    optimizer: OptimizerConfig,
    topology: Topology,
    is_head_fresh: bool,
) -> TrainedRole:
    """What `build_trained` gives, where this rank holds a part of it; all ranks must call it."""
    precision, moe_aux_loss_coef = config.precision, config.models.moe_aux_loss_coef
    if topology.holds_shard:
        return build_trained(
            name, source, has_scalar_head, precision, optimizer, topology, config.run.seed, config.parallel,
            is_head_fresh, moe_aux_loss_coef,
        )  # fmt: skip
    is_balanced = bool(moe_aux_loss_coef) and source.shape().experts is not None
    scale = _scale(source, has_scalar_head, is_head_fresh)
    model = _absent(name, source, has_scalar_head, precision, topology, scale, is_balanced)
    meet_builders()
    return model


def _scale(source: WeightSource, has_scalar_head: bool, is_head_fresh: bool) -> ValueScale:
    """Of the values: the source's where its head is kept."""
    return source.scale() if has_scalar_head and not is_head_fresh else ValueScale()


def _absent(
    name: str,
    source: WeightSource,
    has_scalar_head: bool,
    precision: FrozenPrecisionConfig,
    topology: Topology,
    scale: ValueScale,
    is_balanced: bool = False,
) -> AbsentModel:
    """Meets the ranks of the layout where they load."""
    dtype = _DTYPES[precision.dtype]
    model = AbsentModel(name, source.shape(), has_scalar_head, scale, dtype, topology, is_balanced)
    if source.kind == "checkpoint":
        load_weights(source.path, model)
    else:
        topology.raise_together(None)
    return model


def _load(model: FrozenModel, source: WeightSource, seed: int, is_head_fresh: bool) -> None:
    if source.kind == "checkpoint":
        load_weights(source.path, model, seed if is_head_fresh else None)
        return
    error: UserError | None = None
    fresh_head_seed = seed if is_head_fresh else None
    try:
        if source.kind == "random":
            norm = 0.0 if model.shape.has_shifted_norms else 1.0
            read = random_reader(seed, model.shape.init_std, norm)
        elif source.kind == "megatron":
            read = megatron_reader(source, model.has_scalar_head, fresh_head_seed)
        else:
            read = hf_reader(source.path, model.has_scalar_head, fresh_head_seed)
        not_finite = load_hf_tensors(model.module, model.shape, model.has_scalar_head, model.topology, read)
        error = _told(not_finite, model, source.path)
    except UserError as failure:  # one rank's share of the tensors may lie in the only damaged file
        error = failure
    model.topology.raise_together(error)


def _told(not_finite: dict[str, int], model: FrozenModel, path: Path) -> UserError | None:
    """Why a model with such tensors cannot be used; None where it can, after a warning."""
    if not not_finite:
        return None
    found = f"{path} holds {described(not_finite)}"
    is_tied = model.shape.is_tied and not model.has_scalar_head
    if not_finite.keys() != {EMBEDDING} or is_tied:
        return ModelFolderError(
            f"{found}; every output of the model would be NaN. It diverged, or was damaged while it was saved or "
            "merged: fetch it again, or take an earlier checkpoint"
        )
    # Rows of tokens that no text may have; of a text that has one, the update is skipped.
    if model.topology.data_rank == 0:
        warnings.warn(f"{found}; texts with these tokens cannot be trained on", stacklevel=2)
    return None


def build_average(model: TrainedRole, source: WeightSource) -> FrozenRole:
    """An average that starts at `source`, as the model did; its name is the model's with `_ema`."""
    precision = FrozenPrecisionConfig(dtype="fp32")
    return place_frozen(f"{model.name}_ema", source, model.has_scalar_head, precision, model.topology)


@torch.no_grad()
def update_average(average: FrozenRole, model: TrainedRole, beta: float) -> None:
    """average <- beta average + (1 - beta) model; call it after every optimizer step.

    Nothing happens on a rank that holds neither.

    Source: OpenRLHF 0.4.4, utils/deepspeed/deepspeed.py:moving_average.
    """
    if isinstance(average, AbsentModel) or isinstance(model, AbsentModel):
        return
    means = {plain_name(name): mean for name, mean in average.module.named_parameters()}
    for name, weight in model.module.named_parameters():  # the two may differ in kernels, so in order
        means[plain_name(name)].lerp_(weight.float(), 1 - beta)
