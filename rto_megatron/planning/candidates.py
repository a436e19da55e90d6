"""Layouts that a recipe may be given: those that are sound on some GPUs, and which of them fit by the formulas."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from rto_megatron.config.facts import facts_of
from rto_megatron.config.plan import StagePlan
from rto_megatron.config.schema import Stage
from rto_megatron.errors import UserError
from rto_megatron.models.shape import ModelShape
from rto_megatron.planning.gpus import Gpu
from rto_megatron.planning.judgement import judged
from rto_megatron.planning.memory import fullest_bytes, weight_bytes
from rto_megatron.planning.whole_step import Lengths, StepTime, longest_lengths, pool_tensor, time_step

_TENSOR = _PIPELINE = (1, 2, 4, 8)  # tensor ranks stay within a machine of eight
_EXPERT = (1, 2, 4, 8, 16)
_LONG = 16384  # tokens from which rows are worth cutting
_POOL_SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Candidate:
    """A recipe with a layout.

    Args:
        pool_tensor: GPUs of each server of a pool of its own; 1 where there is none.

    Example:
        Candidate(("parallel.tensor=4",), plan, shapes, pool_gpus=4, pool_tensor=1, num_bytes=2**36, time=time)
    """

    overrides: tuple[str, ...]
    plan: StagePlan
    shapes: dict[str, ModelShape]
    pool_gpus: int
    pool_tensor: int
    num_bytes: int  # of the fullest rank, by the closed formulas
    time: StepTime


def candidates(
    load: Callable[[Sequence[str]], Stage],
    gpus: int,
    gpu: Gpu,
    assume: list[str],
    lengths: Lengths | None,
    gpus_per_node: int = 8,
) -> list[Candidate]:
    """All sound layouts; whether they fit is another question.

    Args:
        load: the recipe with some overrides.
        lengths: None: the longest that the recipe admits.
        gpus_per_node: of a machine; of several a pool has whole ones.
    """
    found: list[Candidate] = []
    base = load(())
    for pool_gpus in _pools(base, gpus, gpus_per_node):
        for overrides in _layouts(base):
            try:
                config = load(overrides)
                world_size = gpus if _is_colocated(config) else gpus - pool_gpus
                plan, known = judged(config, world_size, assume, "")
            except UserError:
                continue
            shapes = {name: one.shape for name, one in known.items()}
            if any(role.name not in shapes for role in plan.roles):
                continue
            tensor = _pool_tensor(plan, shapes, gpu, pool_gpus)
            if tensor is None:
                continue
            time = time_step(plan, shapes, gpu, pool_gpus, lengths or longest_lengths(plan))
            num_bytes = fullest_bytes(plan, known)
            found.append(Candidate(overrides, plan, shapes, pool_gpus, tensor, num_bytes, time))
    return found


def fitting(found: Sequence[Candidate], gpu: Gpu) -> list[Candidate]:
    """Those that fit by the formulas, the fastest first; of equally fast ones that with the least memory."""
    return sorted(
        (one for one in found if one.num_bytes <= gpu.usable_bytes),
        key=lambda one: (float(f"{one.time.seconds:.4g}"), one.num_bytes),
    )


def _pools(config: Stage, gpus: int, gpus_per_node: int) -> Sequence[int]:
    facts = facts_of(config)
    if facts.pool is None:
        return (0,)
    if facts.is_colocated:
        return (gpus,)
    whole = 1 if gpus <= gpus_per_node else gpus_per_node
    sizes = {max(1, int(gpus * share / whole)) * whole for share in _POOL_SHARES}
    return sorted(size for size in sizes if size < gpus)


def _is_colocated(config: Stage) -> bool:
    return facts_of(config).is_colocated


def _pool_tensor(plan: StagePlan, shapes: dict[str, ModelShape], gpu: Gpu, pool_gpus: int) -> int | None:
    """GPUs of a server; None where the pool does not hold the policy."""
    online = plan.facts.online
    if online is None:
        return 1
    width, fraction = weight_bytes(online.precision), online.rollout.gpu_memory_fraction or 0.9
    return pool_tensor(shapes["policy"], width, gpu, fraction, pool_gpus)


def _layouts(config: Stage) -> Iterator[tuple[str, ...]]:
    """Overrides of every layout that is tried; the recipe's other keys stay."""
    longest, _ = facts_of(config).longest_sequence
    contexts = (1, 2, 4, 8) if longest >= _LONG else (config.parallel.context,)
    experts = _EXPERT if config.parallel.expert > 1 else (1,)
    for tensor, pipeline, context, expert, recompute in product(
        _TENSOR, _PIPELINE, contexts, experts, ("false", "true")
    ):
        yield (
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.sequence={str(tensor > 1).lower()}",
            *((f"parallel.context={context}",) if len(contexts) > 1 else ()),
            *((f"parallel.expert={expert}", "parallel.expert_tensor=1") if len(experts) > 1 else ()),
            "parallel.distributed_optimizer=true",
            f"precision.recompute={recompute}",
        )
