"""Layouts that a recipe may be given: those that are sound on some GPUs, and which of them fit by the formulas.

Every cut of the policy is tried with each way to sample; then what else may vary is tried on the fastest of those, one
dimension after the other, so that the search stays some hundreds of layouts.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rto_megatron.config.facts import facts_of
from rto_megatron.config.plan import StagePlan
from rto_megatron.config.schema import Stage
from rto_megatron.errors import UserError
from rto_megatron.models.shape import ModelShape
from rto_megatron.planning.colocated_memory import SharedGpu, phase_memory
from rto_megatron.planning.gpus import PROCESS_BYTES, Gpu
from rto_megatron.planning.judgement import judged
from rto_megatron.planning.memory import fullest_bytes, weight_bytes
from rto_megatron.planning.shapes import FoundShape
from rto_megatron.planning.variations import Choices, layouts, refinements, ways_to_sample
from rto_megatron.planning.whole_step import Lengths, StepTime, longest_lengths, pool_tensor, time_step

_POOL_SHARES = (0.25, 0.5, 0.75)
_KEPT = 3  # of the fastest that fit, and of faster ones that do not, on which more is varied


@dataclass(frozen=True)
class Candidate:
    """A recipe with a layout.

    Args:
        choices: dimension -> its overrides; "pool" is how many GPUs sample.
        known: role -> shape.
        pool_tensor: GPUs of each server; 1 where there is none.

    Example:
        Candidate({"tensor": ("parallel.tensor=4",)}, plan, known, 4, pool_tensor=1, num_bytes=2**36, time=time)
    """

    choices: Choices
    plan: StagePlan
    known: dict[str, FoundShape]
    pool_gpus: int
    pool_tensor: int
    num_bytes: int  # of the fullest GPU beside one process, by the closed formulas
    time: StepTime

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of all dimensions."""
        return tuple(one for choice in self.choices.values() for one in choice)

    @property
    def shapes(self) -> dict[str, ModelShape]:
        """Of all roles."""
        return {name: found.shape for name, found in self.known.items()}

    @property
    def seconds(self) -> float:
        """A step, as far as it is known: four digits."""
        return float(f"{self.time.seconds:.4g}")


@dataclass
class Search:
    """The layouts of a recipe on some GPUs.

    Args:
        load: the recipe with some overrides.
        held: keys that stay as they are.
        lengths: None: the longest that the recipe admits.
        gpus_per_node: of a machine; of several a pool has whole ones.

    Example:
        Search(load, 8, gpu, assume=[], held=(), lengths=None).candidates()
    """

    load: Callable[[Sequence[str]], Stage]
    gpus: int
    gpu: Gpu
    assume: list[str]
    held: Collection[str]
    lengths: Lengths | None
    gpus_per_node: int = 8
    _found: dict[tuple[int, frozenset[str]], Candidate | None] = field(default_factory=dict)

    def candidates(self) -> list[Candidate]:
        """All sound layouts that were tried; whether they fit is another question."""
        base = self.load(())
        ways = [
            (way, pool_gpus)
            for way in ways_to_sample(base, self.held)
            for pool_gpus in self._pools(self.load(way))
        ]
        first = [
            self._tried({"sampling": way, **layout}, pool_gpus)
            for way, pool_gpus in ways
            for layout in layouts(base, self.held)
        ]
        found = [one for one in first if one is not None]
        for dimension in ("ahead", "roles", "chunks", "offload"):
            found += [one for best in self._best(found) for one in self._varied(best, dimension)]
            found = list({id(one): one for one in found}.values())
        return found

    def _varied(self, one: Candidate, dimension: str) -> Iterator[Candidate]:
        choices = refinements(one.plan, one.shapes, self.gpu, self.held).get(dimension, ())
        for choice in choices[1:]:
            tried = self._tried({**one.choices, dimension: choice}, one.pool_gpus)
            if tried is not None:
                yield tried

    def _best(self, found: Sequence[Candidate]) -> list[Candidate]:
        """Of each way to sample the fastest that fit, and of faster ones that do not the fastest and the smallest."""
        ways = {(one.choices["sampling"], one.choices.get("ahead", ())): one for one in found}
        kept: list[Candidate] = []
        for way in ways:
            own = [one for one in found if (one.choices["sampling"], one.choices.get("ahead", ())) == way]
            whole = fitting(own, self.gpu)
            least = whole[0].seconds if whole else float("inf")
            others = [o for o in own if o.num_bytes > self.gpu.usable_bytes and o.seconds <= least]
            smallest = sorted(others, key=lambda one: one.num_bytes)[:_KEPT]
            kept += [*whole[:_KEPT], *sorted(others, key=_order)[:_KEPT], *smallest]
        return kept

    def _pools(self, config: Stage) -> Sequence[int]:
        facts = facts_of(config)
        if facts.pool is None:
            return (0,)
        if facts.is_colocated:
            return (self.gpus,)
        whole = 1 if self.gpus <= self.gpus_per_node else self.gpus_per_node
        sizes = {max(1, int(self.gpus * share / whole)) * whole for share in _POOL_SHARES}
        return sorted(size for size in sizes if size < self.gpus)

    def _tried(self, choices: Choices, pool_gpus: int) -> Candidate | None:
        """None where something speaks against it."""
        key = pool_gpus, frozenset(one for choice in choices.values() for one in choice)
        if key not in self._found:
            self._found[key] = self._judged(choices, pool_gpus)
        return self._found[key]

    def _judged(self, choices: Choices, pool_gpus: int) -> Candidate | None:
        try:
            config = self.load([one for choice in choices.values() for one in choice])
            world_size = self.gpus if facts_of(config).is_colocated else self.gpus - pool_gpus
            plan, known = judged(config, world_size, self.assume, "")
        except UserError:
            return None
        shapes = {name: one.shape for name, one in known.items()}
        if any(role.name not in shapes for role in plan.roles):
            return None
        tensor = _pool_tensor(plan, shapes, self.gpu, pool_gpus)
        if tensor is None:
            return None
        time = time_step(plan, shapes, self.gpu, pool_gpus, self.lengths or longest_lengths(plan))
        num_bytes = fullest_bytes(plan, known)
        if plan.facts.is_colocated:
            num_bytes = shared_bytes(plan, known, self.gpu, tensor, None)
        return Candidate(choices, plan, known, pool_gpus, tensor, num_bytes, time)


def fitting(found: Iterable[Candidate], gpu: Gpu) -> list[Candidate]:
    """Those that fit by the formulas, the fastest first; of equally fast ones what is cut and moved least."""
    return sorted((one for one in found if one.num_bytes <= gpu.usable_bytes), key=_order)


def shared_bytes(
    plan: StagePlan, known: dict[str, FoundShape], gpu: Gpu, tensor: int, training: int | None
) -> int:
    """Memory of a GPU that trainer and pool share, beside one process, in the phase that takes most.

    Args:
        tensor: GPUs of a server.
        training: bytes of the trainer's fullest rank while it trains; None: by the closed formulas.
    """
    pool = plan.facts.pool
    assert pool is not None and pool.gpu_memory_fraction is not None
    shared = SharedGpu(int(gpu.gib * 2**30), pool.gpu_memory_fraction, tensor)
    train, *others = phase_memory(plan, known, shared)
    if training is None:
        return max(phase.total for phase in (train, *others)) - PROCESS_BYTES
    beside = train.total - fullest_bytes(plan, known)
    return max(training + beside, *(phase.total for phase in others)) - PROCESS_BYTES


def _order(one: Candidate) -> tuple[float, int, int, int]:
    layout, training = one.plan.layout, one.plan.facts.training
    moved = 0 if training is None else len(training.offload)
    return one.seconds, layout.replica_ranks * layout.virtual, moved, one.num_bytes


def _pool_tensor(plan: StagePlan, shapes: dict[str, ModelShape], gpu: Gpu, pool_gpus: int) -> int | None:
    """GPUs of a server; None where the pool does not hold the policy."""
    online = plan.facts.online
    if online is None:
        return 1
    width, fraction = weight_bytes(online.precision), online.rollout.gpu_memory_fraction or 0.9
    return pool_tensor(shapes["policy"], width, gpu, fraction, pool_gpus)
