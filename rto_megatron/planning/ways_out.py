"""What to do where no layout of a recipe fits: by how much it does not, and the cheapest changes that help."""

from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from rto_megatron.errors import RecipeError
from rto_megatron.planning.candidates import Candidate, fitting
from rto_megatron.planning.gpus import KNOWN_GPUS, Gpu
from rto_megatron.planning.memory import gib

_WAYS = 3
_MOST_TIMES = 8  # of the GPUs that were asked for

# (number of GPUs, their kind, overrides) -> layouts
type Find = Callable[[int, Gpu, Sequence[str]], list[Candidate]]


def refuse_nothing_fits(found: Sequence[Candidate], find: Find, gpus: int, gpu: Gpu) -> NoReturn:
    """Raises RecipeError with what is missing and the ways out, what costs nothing first.

    Args:
        found: all sound layouts; none where the recipe has none on so many GPUs.
    """
    if not found:
        raise RecipeError(
            f"no layout of the recipe is sound on {gpus} GPUs ({gpu.name}), or no pool of them holds the policy; see "
            f"rto check RECIPE --gpus {gpus} for what speaks against the recipe's own"
        )
    least = min(found, key=lambda one: one.num_bytes)
    ways = [way for way, _ in zip(_ways(least, find, gpus, gpu), range(_WAYS), strict=False)]
    advice = "; ".join(ways) if ways else "nothing that was tried helps: take a smaller model"
    raise RecipeError(
        f"no layout fits {gpus} {gpu.name} of {gib(gpu.usable_bytes)}: the smallest takes {gib(least.num_bytes)}, "
        f"{gib(least.num_bytes - gpu.usable_bytes)} too much ({' '.join(least.overrides)}). Ways out: {advice}"
    )


def _ways(least: Candidate, find: Find, gpus: int, gpu: Gpu) -> Iterator[str]:
    """Changes that help, each by itself: keys of the recipe, then more GPUs, then larger ones."""
    for change in _changes(least):
        if fitting(find(gpus, gpu, [change]), gpu):
            yield f"set {change}"
    times = 2
    while times <= _MOST_TIMES:
        if fitting(find(gpus * times, gpu, ()), gpu):
            yield f"take {gpus * times} GPUs"
            break
        times *= 2
    for other in sorted(KNOWN_GPUS.values(), key=lambda one: one.gib):
        if other.gib > gpu.gib and fitting(find(gpus, other, ()), other):
            yield f"take {gpus} {other.name}"
            break


def _changes(least: Candidate) -> Iterator[str]:
    training = least.plan.facts.training
    assert training is not None
    longest, _ = least.plan.facts.longest_sequence
    if training.batch.tokens is not None and training.batch.tokens > longest:
        yield f"batch.tokens={longest}"
    if training.precision.dtype == "fp32":
        yield "precision.dtype=bf16"
