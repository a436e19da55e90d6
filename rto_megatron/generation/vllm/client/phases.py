"""Whose turn it is on GPUs that trainer and pool share: the phases of a server between two uses of them.

    ASLEEP ──wake weights──> RECEIVING ──wake cache, once a push is proved──> SERVING ──sleep──> ASLEEP

vLLM's sleep of level 2 discards weights and cache. What wakes up is memory with no meaning, so between
waking and a proved push nothing may be generated: vLLM stays paused while any of its memory sleeps and
resumes by itself when the last of it wakes. /resume would lift the pause too early; in RECEIVING nobody may
call it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from rto_megatron.errors import PoolError
from rto_megatron.generation.vllm.client.server_client import RefusedError, ServerClient


class Phase(Enum):
    """What a server holds of its GPU's memory."""

    UNSURE = "in no known phase"  # it has just started, an earlier trainer left it, or a move failed
    ASLEEP = "asleep"  # what a process needs; neither weights nor cache
    RECEIVING = "receiving weights"  # memory for the weights, without a meaning until a push; no cache
    SERVING = "serving"  # proved weights and the cache


@dataclass(frozen=True)
class Move:
    """A step from one phase to the next.

    Args:
        route: of the server, which does it.
        status: what the answer must say: vLLM answers 200 to a move that it did not make.
        check: further proof that it was made.

    Example:
        move.route, [phase.value for phase in move.sources]
    """

    name: str
    sources: frozenset[Phase]
    target: Phase
    route: str
    status: str
    check: Callable[[ServerClient], bool]


SLEEP = Move(
    name="put to sleep",
    sources=frozenset(Phase),  # one that is asleep may have been restarted; vLLM lets sleepers sleep
    target=Phase.ASLEEP,
    route="/sleep?level=2&mode=abort",
    status="sleeping",
    check=lambda client: client.request("GET", "/is_sleeping")["is_sleeping"] is True,
)
WAKE_WEIGHTS = Move(
    name="given memory for weights",
    sources=frozenset({Phase.ASLEEP}),
    target=Phase.RECEIVING,
    route="/wake_up?tags=weights",
    status="sleeping",  # its cache still does
    check=ServerClient.is_paused,
)
WAKE_CACHE = Move(
    name="given its cache",
    sources=frozenset({Phase.RECEIVING}),
    target=Phase.SERVING,
    route="/wake_up?tags=kv_cache",
    status="awake",
    check=lambda client: not client.is_paused(),
)


class PoolPhases:
    """Moves servers through their phases and refuses a move out of turn; for the one rank that drives the pool.

    Different servers may be moved at the same time from different threads.

    Example:
        PoolPhases().of("http://127.0.0.1:8000") is Phase.UNSURE
    """

    def __init__(self) -> None:
        self._phases: dict[str, Phase] = {}

    def of(self, address: str) -> Phase:
        """The phase of a server."""
        return self._phases.get(address, Phase.UNSURE)

    def begin_push(self, client: ServerClient) -> None:
        """Gives a server memory for the weights of a push, and nothing else; it cannot generate.

        Raises:
            PoolError: it serves, or did not do it.
        """
        if self.of(client.address) is Phase.SERVING:
            raise PoolError(
                f"inference server {client.address} serves; it must be put to sleep before the next weight push"
            )
        self._move(client, SLEEP)
        self._move(client, WAKE_WEIGHTS)

    def end_push(self, client: ServerClient, version: int) -> None:
        """Lets a server generate again, once all its workers have loaded and proved the weights of `version`.

        Raises:
            PoolError: it was not in a push, holds another version, or did not do it.
        """
        self._require(client, WAKE_CACHE)
        held = client.weight_version()
        if held != str(version):
            raise PoolError(
                f"inference server {client.address} holds weight version {held}, expected {version}; it stays paused"
            )
        self._move(client, WAKE_CACHE)

    def make_room(self, client: ServerClient) -> None:
        """Takes weights and cache from a server, for the trainer's activations.

        Raises:
            UserError: it did not do it.
        """
        self._move(client, SLEEP)

    def _require(self, client: ServerClient, move: Move) -> None:
        phase = self.of(client.address)
        if phase not in move.sources:
            allowed = " or ".join(sorted(source.value for source in move.sources))
            raise PoolError(
                f"inference server {client.address} is {phase.value} and cannot be {move.name}; it must be {allowed}"
            )

    def _move(self, client: ServerClient, move: Move) -> None:
        self._require(client, move)
        self._phases[client.address] = Phase.UNSURE
        status = client.request("POST", move.route).get("status")
        if status != move.status or not move.check(client):
            raise RefusedError(
                f"inference server {client.address} was not {move.name}: POST {move.route} answered {status!r}, "
                f"expected {move.status!r}; nothing may be generated until a weight push succeeds"
            )
        self._phases[client.address] = move.target
