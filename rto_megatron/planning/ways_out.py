"""What to do where no layout of a recipe fits: by how much it does not, and the cheapest changes that help."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NoReturn

from rto_megatron.errors import RecipeError
from rto_megatron.planning.candidates import Candidate, fitting
from rto_megatron.planning.gpus import KNOWN_GPUS, Gpu
from rto_megatron.planning.memory import gib

_WAYS = 3
_MOST_TIMES = 64  # of the GPUs that were asked for

# (number of GPUs, their kind, overrides) -> layouts
type Find = Callable[[int, Gpu, Sequence[str]], list[Candidate]]


def refuse_nothing_fits(
    found: Sequence[Candidate], find: Find, gpus: int, gpu: Gpu, trained_bytes: int
) -> NoReturn:
    """Raises RecipeError with what is missing and the ways out, what costs nothing first.

    Args:
        found: all sound layouts; none where the recipe has none on so many GPUs.
        trained_bytes: what lies on GPUs while a step updates, whatever the layout is.
    """
    least = min(found, key=lambda one: one.num_bytes, default=None)
    ways = list(islice(_ways(least, find, gpus, gpu, trained_bytes), _WAYS))
    advice = "; ".join(ways) if ways else "nothing that was tried helps: take a smaller model"
    raise RecipeError(f"{_missing(least, gpus, gpu, trained_bytes)}. Ways out: {advice}")


def _missing(least: Candidate | None, gpus: int, gpu: Gpu, trained_bytes: int) -> str:
    """By how much nothing fits."""
    if least is not None:
        return (
            f"no layout fits {gpus} {gpu.name} of {gib(gpu.usable_bytes)}: the smallest takes "
            f"{gib(least.num_bytes)}, {gib(least.num_bytes - gpu.usable_bytes)} too much ({' '.join(least.overrides)})"
        )
    if (beyond := trained_bytes - gpus * gpu.usable_bytes) > 0:
        return (
            f"no layout fits {gpus} {gpu.name}: what the recipe trains takes {gib(trained_bytes)} with its gradients "
            f"and optimizers, {gib(beyond)} more than all of them have"
        )
    return (
        f"no layout of the recipe is sound on {gpus} GPUs ({gpu.name}), or no pool of them holds the policy; see rto "
        f"check RECIPE --gpus {gpus} for what speaks against the recipe's own"
    )


def _ways(least: Candidate | None, find: Find, gpus: int, gpu: Gpu, trained_bytes: int) -> Iterator[str]:
    """Changes that help, each by itself: keys of the recipe, then more GPUs, then larger ones, of which fewer do."""

    def has_room(number: int, kind: Gpu) -> bool:
        is_worth_trying = trained_bytes <= number * kind.usable_bytes
        return is_worth_trying and bool(fitting(find(number, kind, ()), kind))

    for change in () if least is None else _changes(least):
        if fitting(find(gpus, gpu, [change]), gpu):
            yield f"set {change}"
    numbers = [gpus * 2**power for power in range(_MOST_TIMES.bit_length())]
    more = next((number for number in numbers[1:] if has_room(number, gpu)), None)
    if more is not None:
        yield f"take {more} GPUs"
    for kind in sorted(KNOWN_GPUS.values(), key=lambda one: one.gib):
        fewer = [number for number in numbers if more is None or number < more]
        if kind.gib > gpu.gib and (fitted := next((n for n in fewer if has_room(n, kind)), None)):
            yield f"take {fitted} {kind.name}"


def _changes(least: Candidate) -> Iterator[str]:
    training = least.plan.facts.training
    assert training is not None
    longest, _ = least.plan.facts.longest_sequence
    if training.batch.tokens is not None and training.batch.tokens > longest:
        yield f"batch.tokens={longest}"
    if training.batch.micro is not None and training.batch.micro > 1:
        yield "batch.micro=1"
    if training.precision.dtype == "fp32":
        yield "precision.dtype=bf16"
