"""Where each model goes and what it costs: parameters and memory per rank, without building anything.

Memory of a trained model with Adam (Megatron-LM's theoretical_memory_usage.py): 18 bytes a parameter in
bf16 (weight 2, fp32 gradient 4, fp32 master 4, moments 8), or 6 + 12 / data-parallel ranks with the
distributed optimizer; 16 in fp32; a frozen model has its weights only. Experts lie on ranks of their own,
which have fewer replicas. `planning/activation_memory.py` has what a training forward keeps.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rto_megatron.config.facts import Facts, facts_of
from rto_megatron.config.plan import StagePlan
from rto_megatron.config.roles import Role, roles_of
from rto_megatron.config.schema import Stage, TrainStage
from rto_megatron.config.step_phases import NEEDED, StepPhase
from rto_megatron.config.training import FrozenPrecisionConfig
from rto_megatron.models.parameters import num_parameters, stage_sizes
from rto_megatron.models.shape import ModelShape
from rto_megatron.planning.activation_memory import activation_bytes
from rto_megatron.planning.shapes import FoundShape

_GIB = 1024**3
_GRADIENT_BYTES = 4  # float32


@dataclass(frozen=True)
class RoleCost:
    """Cost of one role on the fullest rank.

    Example:
        RoleCost(parameters=8 * 10**9, parameters_per_rank=2 * 10**9, bytes_per_rank=16 * 10**9)
    """

    parameters: int
    parameters_per_rank: int
    bytes_per_rank: int


def role_cost(role: Role, shape: ModelShape, plan: StagePlan) -> RoleCost:
    """Parameters and weight, gradient and optimizer memory of `role`, in bytes on the fullest rank."""
    total = num_parameters(shape, role.has_value_head)
    if role.shares is not None:
        return RoleCost(total, 0, 0)
    return RoleCost(
        total,
        sum(_held(role, shape, plan)),
        int(sum(sum(parts.values()) for parts in _resident(role, shape, plan))),
    )


def _held(role: Role, shape: ModelShape, plan: StagePlan) -> tuple[int, int]:
    """Parameters on the fullest rank, without experts and of experts."""
    layout = plan.layout_of(role.name)
    stages = [
        (-(-others // layout.tensor), -(-experts // layout.expert_ranks))
        for others, experts in stage_sizes(
            shape, role.has_value_head, layout.pipeline, layout.virtual, layout.stages
        )
    ]
    return max(stages, key=sum)


def _resident(role: Role, shape: ModelShape, plan: StagePlan) -> list[dict[str, float]]:
    """Bytes on the fullest rank of what a role has, by the names of `offload`: of experts, whose optimizer has other
    replicas to be shared with, and of the rest."""
    layout = plan.layout_of(role.name)
    return [
        {name: width * num for name, width in _parts(role, plan.facts, plan.config, replicas).items()}
        for num, replicas in zip(
            _held(role, shape, plan), (layout.copies, layout.expert_replicas), strict=True
        )
    ]


def model_bytes(
    plan: StagePlan, shapes: Mapping[str, FoundShape], names: Collection[str] | None = None
) -> int:
    """Memory of the models on the fullest rank while it scores or updates, whichever takes more.

    Models of unknown shape count nothing.

    Args:
        names: of the roles that the rank holds; None: all.
    """
    return max(resident_bytes(plan, shapes, phase, names) for phase in ("score", "update"))


def resident_bytes(
    plan: StagePlan,
    shapes: Mapping[str, FoundShape],
    phase: StepPhase,
    names: Collection[str] | None = None,
) -> int:
    """Memory of the models on the fullest rank in a phase: all of it, less what `offload` then keeps on the host.

    Args:
        names: see `model_bytes`.
    """
    training = plan.facts.training
    away = set() if training is None else set(training.offload) - NEEDED[phase]
    size = 0.0
    for role in plan.roles:
        if role.name not in shapes or role.shares is not None or role.name not in (names or shapes):
            continue
        for parts in _resident(role, shapes[role.name].shape, plan):
            size += sum(width for name, width in parts.items() if name not in away)
    return int(size)


def moved_bytes(plan: StagePlan, shapes: Mapping[str, ModelShape]) -> int:
    """What `offload` moves in a step on the fullest rank: frozen weights come once, what is trained goes and comes."""
    training = plan.facts.training
    named, size = set() if training is None else set(training.offload), 0.0
    for role in plan.roles:
        if role.shares is None:
            times = 2 if role.is_trained else 1
            for parts in _resident(role, shapes[role.name], plan):
                moved = {
                    name: width for name, width in parts.items() if name in named and name != "gradients"
                }
                size += times * sum(moved.values())
    return int(size)


def fullest_bytes(plan: StagePlan, shapes: Mapping[str, FoundShape]) -> int:
    """Models and activations on the fullest rank, whatever roles it holds; see `model_bytes`."""
    sets = plan.rank_sets.values()
    return max(model_bytes(plan, shapes, names) + activation_bytes(plan, shapes, names) for names in sets)


def trained_bytes(config: Stage, shapes: Mapping[str, FoundShape]) -> int:
    """Weights, gradients and optimizers of all trained models, each once: what all ranks hold together in an update."""
    size, facts = 0.0, facts_of(config)
    for role in roles_of(config):
        if role.is_trained:
            parts = _parts(role, facts, config, replicas=1)
            width = sum(parts[name] for name in (role.name, "gradients", "optimizer"))
            size += width * num_parameters(shapes[role.name].shape, role.has_value_head)
    return int(size)


def weight_bytes(precision: FrozenPrecisionConfig) -> int:
    """The bytes of one number in the stage's dtype."""
    return 2 if precision.dtype == "bf16" else 4


def checkpoint_bytes(config: TrainStage, shapes: Mapping[str, FoundShape]) -> int:
    """Size of one checkpoint of a stage: weights and optimizer state of every trained model, in bytes.

    Args:
        shapes: of the trained roles.
    """
    size, facts = 0.0, facts_of(config)
    for role in roles_of(config):
        if role.is_trained:
            parameters = num_parameters(shapes[role.name].shape, role.has_value_head)
            size += parameters * (sum(_parts(role, facts, config, replicas=1).values()) - _GRADIENT_BYTES)
    return int(size)


def _parts(role: Role, facts: Facts, config: Stage, replicas: int) -> dict[str, float]:
    """Bytes a parameter of what a role has, by the names of `offload`."""
    weights: dict[str, float] = {role.name: weight_bytes(config.precision)}
    optimizer = facts.optimizer_of(role.name) if role.is_trained else None
    if facts.training is None or optimizer is None:
        return weights
    online = facts.online
    has_average = role.name == "policy" and online is not None and online.algorithm.ema_beta is not None
    state = (4 if config.precision.dtype == "bf16" else 0) + (8 if optimizer.kind == "adam" else 0)
    shards = replicas if facts.training.parallel.distributed_optimizer else 1
    average = {"policy_ema": 4.0} if has_average else {}
    return {**weights, "gradients": _GRADIENT_BYTES, **average, "optimizer": state / shards}


def gib(size: float) -> str:
    """Bytes as GiB for people."""
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{size / 1024**2:.1f} MiB"
