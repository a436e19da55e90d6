"""Fixed rollouts of unequal lengths: the same input to an update at every layout."""

import random

from rto_megatron.types import Rollout


def rollouts(count: int = 8, vocab_size: int = 96, version: int = 0) -> tuple[Rollout, ...]:
    """Seeded prompts and responses; some are cut by the length limit."""
    rng = random.Random(5)
    made = []
    for index in range(count):
        prompt = tuple(rng.randrange(3, vocab_size) for _ in range(rng.randrange(3, 9)))
        response = [rng.randrange(3, vocab_size) for _ in range(rng.randrange(2, 14))]
        is_cut = index % 4 == 3
        if not is_cut:
            response.append(2)
        made.append(
            Rollout(
                f"p{index}",
                prompt,
                tuple(response),
                tuple(-1.0 for _ in response),
                "length" if is_cut else "stop",
                version,
            )
        )
    return tuple(made)
