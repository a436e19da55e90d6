"""Why a layout is among the best: what its step waits for, and what each single change of it would cost."""

from collections.abc import Iterator, Sequence

from rto_megatron.planning.candidates import Candidate
from rto_megatron.planning.gpus import Gpu
from rto_megatron.planning.memory import gib

_NAMES = {
    "tensor": "tensor ranks",
    "pipeline": "pipeline stages",
    "context": "context ranks",
    "expert": "parts of the experts",
    "recomputation": "recomputation",
    "sampling": "the pool's place",
    "ahead": "rollouts ahead",
    "roles": "layouts of roles",
    "chunks": "chunks of a stage",
    "offload": "offload",
    "pool": "GPUs of the pool",
}


def best(fitting: Sequence[Candidate], num: int) -> list[Candidate]:
    """The fastest of each way to sample, then the next fastest, in this order; of those that take equally long one.

    Args:
        fitting: the fastest first.
        num: at most so many.
    """
    kept: dict[tuple[object, ...], Candidate] = {}
    for one in fitting:
        kept.setdefault((_way(one), one.pool_gpus, one.seconds), one)
    distinct = list(kept.values())
    firsts = list({_way(one): one for one in reversed(distinct)}.values())
    order = [*sorted(firsts, key=distinct.index), *(one for one in distinct if one not in firsts)]
    return order[:num]


def _way(one: Candidate) -> tuple[object, ...]:
    return one.choices["sampling"], one.choices.get("ahead", ())


def reasons(one: Candidate, found: Sequence[Candidate], gpu: Gpu) -> list[str]:
    """Sentences, the most telling first."""
    return [_longest(one), *_neighbours(one, found, gpu)]


def _longest(one: Candidate) -> str:
    phase = max(one.time.phases, key=lambda phase: phase.seconds)
    whole = sum(phase.seconds for phase in one.time.phases)
    online = one.plan.facts.online
    beside = ", beside which the others run" if online is not None and online.rollout.ahead else ""
    return f"{phase.name} takes longest, {phase.seconds / whole:.0%} of all phases{beside}"


def _neighbours(one: Candidate, found: Sequence[Candidate], gpu: Gpu) -> Iterator[str]:
    """Of each dimension the fastest other choice, everything else alike."""
    own = _values(one)
    alike: dict[str, list[Candidate]] = {}
    for other in found:
        values = _values(other)
        differing = [name for name in own.keys() | values.keys() if own.get(name) != values.get(name)]
        if len(differing) == 1:
            alike.setdefault(differing[0], []).append(other)
    for name in _NAMES:
        others = alike.get(name, [])
        if others:
            faster = [other for other in others if other.seconds < one.seconds]
            other = min(faster or others, key=lambda other: (other.seconds, other.num_bytes))
            yield _compared(name, one, other, gpu)


def _values(one: Candidate) -> dict[str, tuple[str, ...]]:
    chosen = {name: choice for name, choice in one.choices.items() if choice}
    return {**chosen, "pool": (str(one.pool_gpus),)}


def _compared(name: str, one: Candidate, other: Candidate, gpu: Gpu) -> str:
    changed, own = (" ".join(_values(each).get(name, ())) for each in (other, one))
    values = f"with {changed}" if changed else f"without {own}"
    more = other.seconds - one.seconds
    pace = "as long" if abs(more) < 0.05 else f"{abs(more):,.1f} s {'more' if more > 0 else 'less'}"
    beyond = other.num_bytes - gpu.usable_bytes
    room = f", and {gib(beyond)} more than there is" if beyond > 0 else f" and {gib(other.num_bytes)}"
    return f"{_NAMES[name]}: {values} {pace}{room}"
