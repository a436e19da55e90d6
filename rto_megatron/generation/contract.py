"""What the trainer asks of anything that samples responses."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rto_megatron.errors import UserError
from rto_megatron.types import Prompt, Rollout


class StaleWeights(UserError):  # noqa: N818  (a state the loop handles, named for what it is)
    """The engine does not hold, or cannot prove that it holds, the requested policy version."""


class NoServersLeft(UserError):  # noqa: N818  (a state the loop handles, named for what it is)
    """Every server of the pool is out; the message gives each one's last reason."""

    reason = "INFRA_NO_GENERATOR"


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        max_tokens: longest response, end-of-sequence included.
        eos_ids: any of these tokens ends a response and is its last token.
        min_tokens: end-of-sequence is forbidden before this many tokens.
        temperature: 0 is greedy.
        top_p: mass of the nucleus; 1 is everything.
        seed: base of every request's own seed.

    Example:
        Sampling(max_tokens=1024, eos_ids=(2,), seed=42)
    """

    max_tokens: int
    eos_ids: tuple[int, ...]
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


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


def request_seed(seed: int, version: int, index: int) -> int:
    """Derives the seed of one request (63 bits) from the base seed, policy version and prompt's position."""
    digest = hashlib.blake2b(f"{seed}/{version}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
