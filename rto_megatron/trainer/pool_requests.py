"""What a replica asks of the pool, and what its ranks get of the answer."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import batched

from rto_megatron.errors import PoolError, UserError
from rto_megatron.generation.contract import Arrived, NoServersLeft, RolloutEngine, Sampling, stream
from rto_megatron.parallel.topology import Topology
from rto_megatron.trainer.arrivals import Arrivals, Hear
from rto_megatron.trainer.background import Background
from rto_megatron.types import Metrics, Prompt, Rollout


@dataclass(frozen=True)
class PoolRequest:
    """What a replica asks of the pool: one response for each prompt.

    Example:
        PoolRequest([Prompt("p7", (1, 529))], Sampling(8, (2,)), version=3)
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    version: int  # the policy version that must sample


@dataclass(frozen=True)
class PoolAnswer:
    """What became of a request, on the rank that asked.

    Example:
        PoolAnswer((), PoolError("the pool is gone"), seconds=0.5)
    """

    rollouts: tuple[Rollout, ...]  # of one version; none after a failure
    failure: UserError | None
    seconds: float  # from the request to the last response


@dataclass(frozen=True)
class Asked:
    """A request that a thread put to the pool, on the rank that asked.

    Example:
        ask_beside(background, engine, request, micro=4).answer.result()
    """

    answer: Future[PoolAnswer]
    arrivals: Arrivals


def ask(
    engine: RolloutEngine, request: PoolRequest, arrived: Arrived = lambda place, rollout: None
) -> PoolAnswer:
    """Puts a request to the pool and waits; meets no other rank, so it may run beside whatever the ranks do."""
    start = time.monotonic()
    rollouts: tuple[Rollout, ...] = ()
    failure = None
    try:
        rollouts = tuple(stream(engine, request.prompts, request.sampling, request.version, arrived))
        require_version(rollouts, request.version)
    except UserError as raised:
        rollouts, failure = (), raised
    return PoolAnswer(rollouts, failure, time.monotonic() - start)


def ask_beside(
    background: Background, engine: RolloutEngine, request: PoolRequest, micro: int | None
) -> Asked:
    """Puts a request to the pool in another thread.

    Args:
        micro: sequences of a micro-batch, which responses are handed on by; None: all of them.
    """
    arrivals = Arrivals(len(request.prompts), micro or len(request.prompts))
    answer = background.submit(partial(ask, engine, request, arrivals.put))
    answer.add_done_callback(lambda _: arrivals.end())
    return Asked(answer, arrivals)


def answered(rollouts: tuple[Rollout, ...]) -> Asked:
    """A request whose rollouts are there."""
    asked = Asked(Future(), Arrivals(0, 1))
    asked.answer.set_result(PoolAnswer(rollouts, None, 0.0))
    asked.arrivals.end()
    return asked


def listen(topology: Topology, asked: Asked | None, hear: Hear) -> float:
    """Tells of responses as they come until the request is over; all ranks of the replica must call this.

    The replica's lead alone knows what is there, and tells the others what to hear next: they make the same calls.

    Args:
        asked: on replica leads; None elsewhere.

    Returns:
        the seconds for which there was nothing to hear.
    """
    waited = 0.0
    while True:
        start = time.monotonic()
        news = topology.replica_value([] if asked is None else asked.arrivals.take(), list[Rollout])
        waited += time.monotonic() - start
        if not news:
            return waited
        hear(news)


def receive(
    topology: Topology, asked: Asked | None, hear: Hear | None = None
) -> tuple[tuple[Rollout, ...], float]:
    """What the pool answered, on every rank of the replica; all ranks must call this.

    Args:
        asked: on replica leads; None elsewhere.
        hear: is told of what comes before the last micro-batch, see `listen`; None: nobody is.

    Returns:
        the rollouts, and the seconds for which there was nothing to hear.

    Raises:
        UserError: as `share`.
    """
    waited = 0.0 if hear is None else listen(topology, asked, hear)
    start = time.monotonic()
    answer = None if asked is None else asked.answer.result()
    waited += time.monotonic() - start
    return share(topology, answer), waited


def share(topology: Topology, answer: PoolAnswer | None) -> tuple[Rollout, ...]:
    """The rollouts of a replica's lead on every rank of the replica; all ranks must call this.

    Args:
        answer: on replica leads; None elsewhere.

    Raises:
        NoServersLeft: on every rank; the last server of the pool died.
        UserError: on every rank; a request failed.
    """
    topology.await_all()
    topology.raise_together(None if answer is None else answer.failure, NoServersLeft)
    rollouts = [] if answer is None else list(answer.rollouts)
    return tuple(topology.replica_value(rollouts, list[Rollout]))


def in_order_of_prompts(
    sampled: Sequence[Rollout], group_size: int, topology: Topology
) -> tuple[Rollout, ...]:
    """What all replicas sampled, on every rank, in the order of the prompts; all ranks must call it.

    Args:
        sampled: by this replica, whose prompts were dealt in turn.
        group_size: responses to a prompt.
    """
    shares = topology.gather(list(sampled), list[Rollout])
    groups = zip(*(batched(share, group_size) for share in shares), strict=True)
    return tuple(rollout for turn in groups for group in turn for rollout in group)


def require_version(rollouts: Sequence[Rollout], newest: int, oldest: int | None = None) -> None:
    """Refuses rollouts of other policy versions than from `oldest` to `newest`.

    Args:
        oldest: None: as `newest`.

    Raises:
        PoolError: names the first one.
    """
    first = newest if oldest is None else oldest
    for rollout in rollouts:
        if not first <= rollout.weight_version <= newest:
            expected = str(newest) if first == newest else f"{first} to {newest}"
            raise PoolError(
                f"rollout {rollout.prompt_id} was sampled by policy version {rollout.weight_version}, "
                f"expected {expected}; nothing was trained on it"
            )


def admitted(rollouts: Sequence[Rollout], step: int, ahead: int, topology: Topology) -> Metrics:
    """Admits a step's rollouts, none of which may be more than `ahead` steps older than its weights.

    All ranks must call it.

    Returns:
        ages, and lengths of prompts, for the logs.

    Raises:
        PoolError: on every rank; names the first that is older.
    """
    failure = None
    try:
        require_version(rollouts, step, step - ahead)
    except PoolError as raised:
        failure = raised
    topology.raise_together(failure)
    age = sum(step - rollout.weight_version for rollout in rollouts)
    tokens = sum(len(rollout.prompt_ids) for rollout in rollouts)
    count = float(len(rollouts))
    return {"rollout/age_steps": (float(age), count), "rollout/prompt_tokens": (float(tokens), count)}
