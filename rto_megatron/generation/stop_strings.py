"""Responses that end with a text: cut behind the token that completes it, whatever engine sampled on."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rto_megatron.generation.contract import Arrived, RolloutEngine, Sampling, stream
from rto_megatron.types import Prompt, Rollout

type Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class StoppingEngine:
    """An engine whose responses end at the first of some texts, if end-of-sequence or the limit does not come first.

    The servers of a pool read no text, so what stands behind a stop was sampled in vain: up to the limit of the
    response. What stays is distributed as if the engine had stopped by itself.

    Args:
        strings: none is empty.
        decode: the text of token ids.

    Example:
        StoppingEngine(engine, ("\\nUser:",), tokenizer.decode).generate(prompts, sampling, version)
    """

    inner: RolloutEngine
    strings: tuple[str, ...]
    decode: Decode

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`; a response that is cut here has the finish reason "stop"."""
        drawn = self.inner.generate(prompts, sampling, version)
        return [self._stopped(rollout, sampling) for rollout in drawn]

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, arrived: Arrived
    ) -> list[Rollout]:
        """See `StreamingEngine.stream`."""

        def cut(place: int, rollout: Rollout) -> None:
            arrived(place, self._stopped(rollout, sampling))

        drawn = stream(self.inner, prompts, sampling, version, cut)
        return [self._stopped(rollout, sampling) for rollout in drawn]

    def _stopped(self, rollout: Rollout, sampling: Sampling) -> Rollout:
        return stopped(rollout, self.strings, sampling.min_tokens, self.decode)


def stopped(rollout: Rollout, strings: Sequence[str], min_tokens: int, decode: Decode) -> Rollout:
    """The response up to the token that completes the first of `strings`, or as it is where none occurs.

    Args:
        min_tokens: what is complete before this many tokens is text like any other.
    """
    ids = rollout.response_ids
    first = max(min_tokens, 1)
    begun = len(decode(ids[: first - 1]))

    def has_stop(num_tokens: int) -> bool:
        text = decode(ids[:num_tokens])
        return any(text.find(one, max(begun - len(one) + 1, 0)) >= 0 for one in strings)

    if len(ids) < first or not has_stop(len(ids)):
        return rollout
    end = bisect_left(range(len(ids)), True, lo=first, key=has_stop)
    return replace(
        rollout,
        response_ids=ids[:end],
        sampled_logprobs=rollout.sampled_logprobs[:end],
        finish_reason="stop",
    )
