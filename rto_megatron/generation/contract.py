"""What the trainer asks of anything that samples responses."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rto_megatron.errors import PoolError, UserError
from rto_megatron.types import Prompt, Rollout


class StaleWeights(PoolError):  # noqa: N818  (a state the loop handles, named for what it is)
    """The engine does not hold, or cannot prove that it holds, the requested policy version."""


class NoServersLeft(PoolError):  # noqa: N818  (a state the loop handles, named for what it is)
    """Every server of the pool is out; the message gives each one's last reason."""

    reason = "INFRA_NO_GENERATOR"


class Unreachable(PoolError):  # noqa: N818  (a state that is handled, named for what it is)
    """No usable answer came back from a server, or that its engine is dead; another server may still do."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        max_tokens: longest response, end-of-sequence included.
        eos_ids: any of these tokens ends a response and is its last token.
        min_tokens: end-of-sequence is forbidden before this many tokens.
        temperature: 0 is greedy.
        top_p: mass of the nucleus; 1 is everything.
        top_k: how many of the likeliest tokens are sampled from; None: all.
        seed: base of every request's own seed.
        places: of each prompt in a larger request of which this one is a part; None: as they come here.

    Example:
        Sampling(max_tokens=1024, eos_ids=(2,), seed=42)
    """

    max_tokens: int
    eos_ids: tuple[int, ...]
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    places: tuple[int, ...] | None = None

    def request_seed(self, version: int, index: int) -> int:
        """The seed of the prompt at `index`, the same in a part of a request as in the whole."""
        return request_seed(self.seed, version, index if self.places is None else self.places[index])


class RolloutEngine(Protocol):
    """An engine that samples responses with one known version of the policy.

    Example:
        (rollout,) = engine.generate([Prompt("p7", (1, 529))], Sampling(8, (2,)), version=3)
    """

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """Samples one response per prompt.

        Args:
            prompts: any number; for several responses to a prompt repeat it, seeds differ by position.
            sampling: how to draw.
            version: the policy version that must sample; every rollout carries it.

        Returns:
            one rollout per prompt, in the order of `prompts`, with the prompt's id.

        Raises:
            StaleWeights: the engine holds another version, or its last weight update failed.
            UserError: the engine cannot be reached or answered something unusable.
        """
        ...


# Told of a response as soon as it is there: the place of its prompt in the request, and the rollout.
type Arrived = Callable[[int, Rollout], None]


@runtime_checkable
class StreamingEngine(RolloutEngine, Protocol):
    """An engine that tells of each response when it comes, so that the trainer need not wait for the slowest.

    Example:
        rollouts = engine.stream(prompts, sampling, version=3, arrived=lambda place, rollout: print(place))
    """

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, arrived: Arrived
    ) -> list[Rollout]:
        """Samples as `generate` does, and returns what it returns.

        Args:
            arrived: called once for each response, in any order, from one thread, before this returns.
        """
        ...


def stream(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: Sampling, version: int, arrived: Arrived
) -> list[Rollout]:
    """See `StreamingEngine.stream`; an engine that is none tells of nothing before its answer."""
    if isinstance(engine, StreamingEngine):
        return engine.stream(prompts, sampling, version, arrived)
    return engine.generate(prompts, sampling, version)


class InferenceServer(Protocol):
    """One server of a pool as a weight push sees it; every method waits for the answer.

    Raises:
        Unreachable: from every method; no usable answer came.
        UserError: from every method; the server did not do it.

    Example:
        server.pause()
        server.join(rendezvous, first_rank, manifest)
    """

    @property
    def address(self) -> str:
        """Names it in messages."""
        ...

    def num_workers(self) -> int:
        """Its processes, each of which receives weights."""
        ...

    def is_paused(self) -> bool:
        """Whether it schedules nothing; asks the engine, so that an answer proves that it lives."""
        ...

    def pause(self) -> None:
        """Ends what it generates, and lets nothing begin."""
        ...

    def begin_push(self) -> None:
        """Pauses it, makes room for weights and opens an update, whatever an earlier trainer left behind."""
        ...

    def join(self, rendezvous: str, first_rank: int, manifest: str) -> None:
        """Makes its workers members of a communicator, from `first_rank` on; returns once all have joined."""
        ...

    def receive(self, version: int) -> None:
        """Makes its workers receive the pieces of the manifest; returns once all have arrived and were proved."""
        ...

    def commit(self, version: int) -> None:
        """Makes its workers load what they received; it holds `version` from here on, and stays paused."""
        ...

    def weight_version(self) -> str:
        """The label of the weights that it holds."""
        ...

    def serve(self, version: int) -> None:
        """Lets it generate with the weights of a push, which must be those of `version`."""
        ...

    def prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        """Log-probs in nats of token_ids[1:], each given the tokens before it."""
        ...


class AskServers(Protocol):
    """Asks several servers of one engine at the same time.

    Example:
        faults = ask(dict.fromkeys(addresses, 30.0), InferenceServer.pause)
    """

    def __call__(
        self, timeouts: Mapping[str, float], question: Callable[[InferenceServer], object]
    ) -> dict[str, UserError]:
        """Puts a question to each; returns the address and the error of those that did not pass.

        Args:
            timeouts: address -> seconds for each request.
        """
        ...


def request_seed(seed: int, version: int, index: int) -> int:
    """Derives the seed of one request (63 bits) from the base seed, policy version and prompt's position."""
    digest = hashlib.blake2b(f"{seed}/{version}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
