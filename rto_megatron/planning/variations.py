"""What a plan varies of a recipe: each dimension's choices as overrides, the recipe's own way first where it has one.

A key that the user gives is kept, and with it the dimension that would set it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.config.facts import facts_of
from rto_megatron.config.plan import StagePlan
from rto_megatron.config.roles import Role, roles_of
from rto_megatron.config.schema import Stage
from rto_megatron.models.parameters import num_parameters
from rto_megatron.models.shape import ModelShape
from rto_megatron.planning.gpus import Gpu
from rto_megatron.planning.memory import weight_bytes

type Overrides = tuple[str, ...]
type Choices = Mapping[str, Overrides]  # dimension -> what sets it

_SPLITS = (1, 2, 4, 8)  # tensor ranks stay within a machine of eight
_EXPERTS = (1, 2, 4, 8, 16)
_LONG = 16384  # tokens from which rows are worth cutting
_CHUNKS = (2, 4)  # of a pipeline stage
_SMALL = 0.5  # of the policy's parameters: a role below may be cut less
_ROLE_SHARE = 0.3  # of a GPU's memory that a small role may take
_POOL_FRACTION = 0.8  # of a GPU, in the pool's turn
_CAP = 2  # of importance weights for rollouts that are ahead, as verl and slime


def layouts(config: Stage, held: Collection[str]) -> Iterator[Choices]:
    """Every cut of the policy, with recomputation and without."""
    longest, _ = facts_of(config).longest_sequence
    contexts = (1, 2, 4, 8) if longest >= _LONG else (config.parallel.context,)
    experts = _EXPERTS if config.parallel.expert > 1 else (1,)
    tensors = (config.parallel.tensor,) if "parallel.tensor" in held else _SPLITS
    dimensions: dict[str, Sequence[Overrides]] = {
        "tensor": [(f"parallel.tensor={n}", f"parallel.sequence={str(n > 1).lower()}") for n in tensors],
        "pipeline": [(f"parallel.pipeline={n}",) for n in _SPLITS],
        "context": [(f"parallel.context={n}",) for n in contexts] if len(contexts) > 1 else [()],
        "expert": [(f"parallel.expert={n}", "parallel.expert_tensor=1") for n in experts]
        if len(experts) > 1
        else [()],
        "optimizer": [("parallel.distributed_optimizer=true",)],
        "recomputation": [(f"precision.recompute={flag}",) for flag in ("false", "true")],
    }
    kept = [_kept(choices, held) for choices in dimensions.values()]
    for chosen in product(*kept):
        yield dict(zip(dimensions, chosen, strict=True))


def ways_to_sample(config: Stage, held: Collection[str]) -> Sequence[Overrides]:
    """The pool on GPUs of its own, then on the trainer's; without a pool nothing."""
    online = facts_of(config).online
    if online is None:
        return [()]
    apart: list[str] = [] if not online.rollout.colocated else ["rollout.colocated=false"]
    if {"policy", "critic"} & set(online.offload):
        apart.append("offload=[]")
    names = [role.name for role in _own(config)]
    together = [
        "rollout.colocated=true",
        f"rollout.gpu_memory_fraction={_POOL_FRACTION}",
        f"offload=[{', '.join([*names, 'gradients', 'optimizer'])}]",
        "rollout.ahead=0",
    ]
    if "rollout.colocated" in held or {grid.ranks for grid in config.parallel.roles.values()} - {None}:
        return [()]
    return [tuple(apart), tuple(one for one in together if one.partition("=")[0] not in held)]


def refinements(
    plan: StagePlan, shapes: Mapping[str, ModelShape], gpu: Gpu, held: Collection[str]
) -> Mapping[str, Sequence[Overrides]]:
    """What may still be changed of a layout, dimension by dimension; the first of each is to leave it."""
    found = {
        "ahead": _ahead(plan, held),
        "roles": _roles(plan, shapes, gpu, held),
        "chunks": _chunks(plan, shapes, held),
        "offload": _offload(plan, held),
    }
    return {name: choices for name, choices in found.items() if len(choices) > 1}


def _own(config: Stage) -> list[Role]:
    return [role for role in roles_of(config) if role.shares is None]


def _kept(choices: Sequence[Overrides], held: Collection[str]) -> Sequence[Overrides]:
    """Without what the user has set."""
    kept = [tuple(one for one in choice if one.partition("=")[0] not in held) for choice in choices]
    return list(dict.fromkeys(kept))


def _ahead(plan: StagePlan, held: Collection[str]) -> Sequence[Overrides]:
    online = plan.facts.online
    if online is None or online.rollout.colocated or "rollout.ahead" in held:
        return [()]
    if online.rollout.ahead:
        return [(), ("rollout.ahead=0",)]
    needs_cap = online.algorithm.pool_importance_cap is None
    cap = (f"algorithm.pool_importance_cap={_CAP}",) if needs_cap else ()
    return [(), ("rollout.ahead=1", *cap)]


def _roles(
    plan: StagePlan, shapes: Mapping[str, ModelShape], gpu: Gpu, held: Collection[str]
) -> Sequence[Overrides]:
    """Small critics and reward models whole on their ranks, or as whole as fits; then on ranks of their own."""
    if plan.config.parallel.roles or any(key.startswith("parallel.roles") for key in held):
        return [()]
    size = num_parameters(shapes["policy"], has_scalar_head=False)
    small = [
        role
        for role in _own(plan.config)
        if role.name in ("critic", "reward") and num_parameters(shapes[role.name], True) < _SMALL * size
    ]
    layout = plan.layout
    if not small or "critic" not in {role.name for role in small}:
        return [()]
    found: list[Overrides] = [()]
    tensor = min(layout.tensor, _least_tensor(plan, small, shapes, gpu))
    if (tensor, 1) != (layout.tensor, layout.pipeline):
        found.append(tuple(key for role in small for key in _grid(role.name, tensor)))
    own = next(
        (
            num
            for num in range(max(1, plan.world_size // 4), plan.world_size // 2 + 1)
            if _is_even(plan, num, tensor)
        ),
        None,
    )
    if own is not None and not plan.facts.is_colocated:
        ranks = f"{plan.world_size - own}-{plan.world_size - 1}"
        found.append(
            tuple(
                key
                for role in small
                for key in (*_grid(role.name, tensor), f"parallel.roles.{role.name}.ranks={ranks}")
            )
        )
    return found


def _is_even(plan: StagePlan, num: int, tensor: int) -> bool:
    """Whether so many ranks of small roles and those that are left hold whole replicas that share batches evenly."""
    rest, online = plan.world_size - num, plan.facts.online
    if num % tensor or rest % plan.layout.replica_ranks or online is None:
        return False
    replicas = (num // tensor, rest // plan.layout.replica_ranks)
    return not any(size % n for size in (online.batch.train, online.batch.rollout) for n in replicas)


def _grid(role: str, tensor: int) -> Overrides:
    sequence = (f"parallel.roles.{role}.sequence=true",) if tensor > 1 else ()
    return (f"parallel.roles.{role}.tensor={tensor}", *sequence)


def _least_tensor(plan: StagePlan, small: Sequence[Role], shapes: Mapping[str, ModelShape], gpu: Gpu) -> int:
    """Ranks over which small roles are cut so that they take no more than their share of a GPU."""
    width = weight_bytes(plan.config.precision)
    weights = sum(num_parameters(shapes[role.name], True) * width for role in small)
    state = sum(16 * num_parameters(shapes[role.name], True) for role in small if role.is_trained)
    fitting = (n for n in _SPLITS if (weights + state) / n <= _ROLE_SHARE * gpu.usable_bytes)
    return next(fitting, _SPLITS[-1])


def _chunks(plan: StagePlan, shapes: Mapping[str, ModelShape], held: Collection[str]) -> Sequence[Overrides]:
    parallel, layers = plan.config.parallel, shapes["policy"].num_layers
    is_held = {"parallel.virtual", "parallel.stages"} & set(held) or parallel.stages is not None
    if parallel.pipeline == 1 or is_held or parallel.virtual > 1:
        return [()]
    return [(), *((f"parallel.virtual={n}",) for n in _CHUNKS if layers % (parallel.pipeline * n) == 0)]


def _offload(plan: StagePlan, held: Collection[str]) -> Sequence[Overrides]:
    training = plan.facts.training
    if training is None or "offload" in held or plan.facts.is_colocated:
        return [()]
    method = ALGORITHMS[plan.config.stage]
    if isinstance(method, OfflineMethod) and method.outputs == "divergence":
        return [()]
    frozen = [role.name for role in _own(plan.config) if not role.is_trained]
    if not frozen:
        return [()]
    spared = [*frozen, "gradients", "optimizer"]
    others = [one for one in ([], spared) if set(one) != set(training.offload)]
    return [(), *((f"offload=[{', '.join(one)}]",) for one in others)]
