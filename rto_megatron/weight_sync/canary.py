"""A fixed sequence whose log-probs trainer and servers must compute alike after a push: against gross errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rto_megatron.errors import PoolError
from rto_megatron.generation.contract import InferenceServer


@dataclass(frozen=True)
class Canary:
    """What the trainer computes.

    Args:
        token_ids: the sequence.
        expected_logprobs: of token_ids[1:], in nats.
        tolerance: largest difference, in nats.

    Example:
        Canary((1, 5, 9), expected_logprobs=(-2.3, -0.7), tolerance=1e-3)
    """

    token_ids: tuple[int, ...]
    expected_logprobs: Sequence[float]
    tolerance: float


def canary_token_ids(vocab_size: int, length: int = 48) -> tuple[int, ...]:
    """A fixed sequence that visits scattered rows of the embedding."""
    return tuple((7 * position * position + 13 * position + 5) % vocab_size for position in range(length))


def check_canary(server: InferenceServer, canary: Canary) -> None:
    """Compares one server with the trainer.

    Raises:
        PoolError: with the numbers.
    """
    expected = canary.expected_logprobs
    got = server.prompt_logprobs(list(canary.token_ids))
    differences = [abs(ours - theirs) for ours, theirs in zip(expected, got, strict=True)]
    # Written so that a NaN fails.
    if all(difference <= canary.tolerance for difference in differences):
        return
    worst = max(
        range(len(differences)), key=lambda at: math.inf if math.isnan(differences[at]) else differences[at]
    )
    mean = sum(differences) / len(differences)
    raise PoolError(
        f"inference server {server.address} computes other log-probs than the trainer: mean difference {mean:.4f}, "
        f"largest {differences[worst]:.4f} nats (trainer {expected[worst]:.4f}, server {got[worst]:.4f}) at canary "
        f"token {worst + 1}, tolerance {canary.tolerance} (rollout.logprob_tolerance)"
    )
