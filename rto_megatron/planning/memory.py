"""Where each model goes and what it costs: parameters and memory per rank, without building anything.

Memory of a trained model with Adam (Megatron-LM's theoretical_memory_usage.py): 18 bytes a parameter in
bf16 (weight 2, fp32 gradient 4, fp32 master 4, moments 8), or 6 + 12 / data-parallel ranks with the
distributed optimizer; 16 in fp32; a frozen model has its weights only. Activations are the largest training
forward of one micro-batch: with recomputation the layers' inputs and one layer's inside, else 34 bytes x
hidden x layers a token (Korthikanti et al. 2022, without the attention matrix, which is never stored), and
fp32 logits with their gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.config.roles import Role, roles_of
from rto_megatron.config.schema import (
    ActorCriticStage,
    OfflineStage,
    OptimizerConfig,
    ReinforcementStage,
    Stage,
    TrainStage,
)
from rto_megatron.models.parameters import fullest_stage, num_parameters
from rto_megatron.models.shape import ModelShape
from rto_megatron.planning.shapes import FoundShape

_GIB = 1024**3
_GRADIENT_BYTES = 4  # float32


@dataclass(frozen=True)
class RoleCost:
    """Cost of one role on the fullest rank."""

    parameters: int
    parameters_per_rank: int
    bytes_per_rank: int


def role_cost(role: Role, shape: ModelShape, config: Stage, data_parallel: int) -> RoleCost:
    """Parameters and weight, gradient and optimizer memory of `role`, in bytes on the fullest rank."""
    total = num_parameters(shape, role.has_value_head)
    if role.shares is not None:
        return RoleCost(total, 0, 0)
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    per_rank = -(-fullest_stage(shape, role.has_value_head, pipeline) // tensor)
    return RoleCost(total, per_rank, int(per_rank * _bytes_per_parameter(role, config, data_parallel)))


def model_bytes(config: Stage, shapes: Mapping[str, FoundShape], data_parallel: int) -> int:
    """Memory of all models of a stage on the fullest rank; those of unknown shape count nothing."""
    return sum(
        role_cost(role, shapes[role.name].shape, config, data_parallel).bytes_per_rank
        for role in roles_of(config)
        if role.name in shapes
    )


def weight_bytes(config: Stage) -> int:
    """The bytes of one number in the stage's dtype."""
    return 2 if config.precision.dtype == "bf16" else 4


def checkpoint_bytes(config: TrainStage, shapes: Mapping[str, FoundShape]) -> int:
    """Size of one checkpoint of a stage: weights and optimizer state of every trained model, in bytes.

    Args:
        shapes: of the trained roles.
    """
    size = 0.0
    for role in roles_of(config):
        if role.is_trained:
            parameters = num_parameters(shapes[role.name].shape, role.has_value_head)
            size += parameters * (_bytes_per_parameter(role, config, data_parallel=1) - _GRADIENT_BYTES)
    return int(size)


def _bytes_per_parameter(role: Role, config: Stage, data_parallel: int) -> float:
    is_bf16 = config.precision.dtype == "bf16"
    optimizer = _optimizer(role, config)
    if optimizer is None:
        return weight_bytes(config)
    average = 4 if _is_averaged(role, config) else 0
    state = (4 if is_bf16 else 0) + (8 if optimizer.kind == "adam" else 0)
    assert isinstance(config, TrainStage)
    shards = data_parallel if config.parallel.distributed_optimizer else 1
    return weight_bytes(config) + _GRADIENT_BYTES + average + state / shards


def _is_averaged(role: Role, config: Stage) -> bool:
    if not isinstance(config, ReinforcementStage) or role.name != "policy":
        return False
    return config.algorithm.ema_beta is not None


def _optimizer(role: Role, config: Stage) -> OptimizerConfig | None:
    if not role.is_trained or not isinstance(config, TrainStage):
        return None
    if isinstance(config, ActorCriticStage) and role.name == "critic":
        return config.critic_optimizer
    return config.optimizer


def activation_bytes(config: Stage, shapes: Mapping[str, FoundShape]) -> int:
    """Activations of one micro-batch of the longest sequences in training, in bytes; 0 without training."""
    if not isinstance(config, TrainStage):
        return 0
    if isinstance(config, ReinforcementStage):
        length = config.data.max_prompt_tokens + config.sampling.max_response_tokens
    else:
        assert isinstance(config, OfflineStage)
        length = config.data.max_length
    sequences = config.batch.micro * (2 if reads_pairs(config) else 1)
    tokens = length * sequences
    tensor = config.parallel.tensor
    width = 1 if config.precision.dtype == "bf16" else 2
    peak = 0
    for role in roles_of(config):
        if not role.is_trained or role.name not in shapes:
            continue
        shape = shapes[role.name].shape
        inside_layer = 34 * width * tokens * shape.hidden_size // tensor
        # The first of P pipeline stages has layers / P, and 1F1B keeps P micro-batches in flight there.
        if config.precision.recompute:
            layers = 2 * width * tokens * shape.hidden_size * shape.num_layers + inside_layer
        else:
            layers = inside_layer * shape.num_layers
        logits = 0 if role.has_value_head else 2 * 4 * tokens * shape.vocab_size // tensor
        peak = max(peak, layers + logits)
    return peak


def reads_pairs(config: Stage) -> bool:
    """Whether a batch of the stage counts pairs, two sequences each."""
    method = ALGORITHMS.get(config.stage)
    return isinstance(method, OfflineMethod) and method.examples == "pairs"


def gib(size: float) -> str:
    """Bytes as GiB for people."""
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{size / 1024**2:.1f} MiB"
