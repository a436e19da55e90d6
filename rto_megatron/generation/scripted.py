"""A rollout engine without a model."""

import math
import random
from collections.abc import Sequence

from rto_megatron.generation.contract import Sampling, StaleWeights
from rto_megatron.types import Prompt, Rollout


class ScriptedEngine:
    """Draws uniform tokens from (seed, version, prompt's position and id); keeps `RolloutEngine`'s contract.

    `sampled_logprobs` are those of the uniform distribution over the vocabulary.

    Args:
        vocab_size: tokens are below it.
        version: the policy version it claims to hold; `hold` changes it as a weight push would.

    Example:
        ScriptedEngine(vocab_size=30, version=4)
    """

    def __init__(self, vocab_size: int, version: int = 0) -> None:
        self._vocab_size = vocab_size
        self._version = version

    def hold(self, version: int) -> None:
        """Takes another policy version."""
        self._version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        _require_version(self._version, version)
        return [self._draw(index, prompt, sampling) for index, prompt in enumerate(prompts)]

    def _draw(self, index: int, prompt: Prompt, sampling: Sampling) -> Rollout:
        chance = random.Random(f"{sampling.request_seed(self._version, index)}/{prompt.id}")
        words = [token for token in range(self._vocab_size) if token not in sampling.eos_ids]
        length = chance.randint(max(1, sampling.min_tokens), sampling.max_tokens)
        is_stopped = chance.random() < 0.5
        response = [chance.choice(words) for _ in range(length)]
        if is_stopped:
            response[-1] = sampling.eos_ids[0]
        else:
            response += [chance.choice(words) for _ in range(sampling.max_tokens - length)]
        logprob = -math.log(self._vocab_size)
        return Rollout(
            prompt_id=prompt.id,
            prompt_ids=prompt.token_ids,
            response_ids=tuple(response),
            sampled_logprobs=(logprob,) * len(response),
            finish_reason="stop" if is_stopped else "length",
            weight_version=self._version,
        )


def _require_version(held: int, version: int) -> None:
    if held != version:
        raise StaleWeights(
            f"the scripted engine holds weight version {held}, expected {version}; push the policy first"
        )
