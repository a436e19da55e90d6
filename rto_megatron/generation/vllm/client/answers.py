"""What one request to a vLLM server says, and what its answer must be to become a rollout."""

from dataclasses import dataclass

from rto_megatron.errors import PoolError
from rto_megatron.generation.contract import Sampling, StaleWeights
from rto_megatron.generation.vllm.client.server_client import Json, ServerFailedError
from rto_megatron.types import FinishReason, Prompt, Rollout

Answer = dict[str, Json]
_RIGHT_TYPE = "a part of the right type"


def request_body(prompt: Prompt, sampling: Sampling, seed: int) -> Answer:
    """The request for one response."""
    # The caller's eos ids are the only ones: without ignore_eos the server adds those of the model folder.
    return {
        "token_ids": list(prompt.token_ids),
        "sampling_params": {
            "max_tokens": sampling.max_tokens,
            "min_tokens": sampling.min_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or 0,
            "seed": seed,
            "stop_token_ids": list(sampling.eos_ids),
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
        },
    }


@dataclass(frozen=True)
class _Choice:
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    versions: tuple[str, ...]


@dataclass(frozen=True)
class PromptTokens:
    """Prompt tokens that servers read, and those of them that their prefix caches had.

    Example:
        PromptTokens(num_read=1024, num_cached=896)
    """

    num_read: int = 0
    num_cached: int = 0

    def __add__(self, other: "PromptTokens") -> "PromptTokens":
        return PromptTokens(self.num_read + other.num_read, self.num_cached + other.num_cached)


def prompt_tokens(answer: Answer) -> PromptTokens:
    """What an answer says of its prompt; a server counts nothing as cached that it does not mention."""
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return PromptTokens()
    details, num_read = usage.get("prompt_tokens_details"), usage.get("prompt_tokens")
    num_cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    return PromptTokens(
        num_read if isinstance(num_read, int) else 0, num_cached if isinstance(num_cached, int) else 0
    )


def to_rollout(address: str, answer: Answer, prompt: Prompt, sampling: Sampling, version: int) -> Rollout:
    """Reads one response, complete and of one policy version.

    Raises:
        StaleWeights: it was sampled by other weights.
        ServerFailedError: the server gave the request up; it, or another one, may still answer it.
        UserError: it contradicts the request or is incomplete.
    """
    choice = _read_choice(address, answer, prompt.id)
    if choice.versions != (str(version),):
        raise StaleWeights(
            f"inference server {address} sampled prompt {prompt.id} with weight versions "
            f"{list(choice.versions)}, expected {version} alone; the weights changed during generation"
        )
    finish_reason = _finish_reason(address, choice, prompt, sampling)
    return Rollout(prompt.id, prompt.token_ids, choice.token_ids, choice.logprobs, finish_reason, version)


def _finish_reason(address: str, choice: _Choice, prompt: Prompt, sampling: Sampling) -> FinishReason:
    if choice.finish_reason == "stop":
        if choice.token_ids[-1] not in sampling.eos_ids:
            raise PoolError(
                f"inference server {address} stopped prompt {prompt.id} at token {choice.token_ids[-1]}, "
                f"expected one of the end-of-sequence tokens {list(sampling.eos_ids)}"
            )
        return "stop"
    if len(choice.token_ids) != sampling.max_tokens:
        raise PoolError(
            f"inference server {address} cut prompt {prompt.id} ({len(prompt.token_ids)} tokens) after "
            f"{len(choice.token_ids)} of {sampling.max_tokens} tokens; start the pool with a "
            "larger --max-model-len"
        )
    return "length"


def _read_choice(address: str, answer: Answer, prompt_id: str) -> _Choice:
    """Reads the response of vLLM's tokens-in, tokens-out route and refuses an incomplete one."""
    try:
        choice = _as_dict(_as_list(answer["choices"])[0])
        finish_reason = str(choice["finish_reason"])
        if finish_reason not in ("stop", "length"):
            # Its other parts may be missing.
            raise ServerFailedError(
                f"inference server {address} ended prompt {prompt_id} with reason {finish_reason!r}, expected stop or "
                "length; it was paused or stopped during generation"
            )
        token_ids = tuple(_as_int(one) for one in _as_list(choice["token_ids"]))
        content = _as_dict(choice["logprobs"])
        entries = [_as_dict(one) for one in _as_list(content["content"])]
        scored = tuple((_as_int(one["token_id"]), _as_float(one["logprob"])) for one in entries)
        spans = [_as_dict(one) for one in _as_list(choice["weight_versions"])]
        versions = tuple(str(span["version"]) for span in spans)
    except (KeyError, IndexError, TypeError) as error:
        raise PoolError(
            f"inference server {address} sent a response without {error}; "
            "rto-megatron needs the vLLM version of its requirements"
        ) from error
    if not token_ids or tuple(token_id for token_id, _ in scored) != token_ids:
        raise PoolError(
            f"inference server {address} sent {len(token_ids)} tokens and log-probs of {len(scored)}, expected one each"
        )
    return _Choice(token_ids, tuple(logprob for _, logprob in scored), finish_reason, versions)


def _as_list(value: Json) -> list[Json]:
    if isinstance(value, list):
        return value
    raise TypeError(_RIGHT_TYPE)


def _as_dict(value: Json) -> dict[str, Json]:
    if isinstance(value, dict):
        return value
    raise TypeError(_RIGHT_TYPE)


def _as_int(value: Json) -> int:
    if isinstance(value, int):
        return value
    raise TypeError(_RIGHT_TYPE)


def _as_float(value: Json) -> float:
    if isinstance(value, float | int):
        return float(value)
    raise TypeError(_RIGHT_TYPE)
