"""How long an answer is in tokens, for Arena-Hard's style control: by OpenAI's tokenizers, or the model's own."""

from collections.abc import Callable, Sequence

import tiktoken
from requests import RequestException
from transformers import PreTrainedTokenizerBase

from rto_megatron.benchmarks.questions import Benchmark
from rto_megatron.errors import MachineError

CountTokens = Callable[[str], int]
OWN = "model"  # in place of an encoding: the model's own tokenizer

# Of the judges' time: Arena-Hard counts v0.1 as gpt-3.5-turbo does, v2.0 as gpt-4o does.
OFFICIAL: dict[Benchmark, str] = {"arena_hard_v0.1": "cl100k_base", "arena_hard_v2.0": "o200k_base"}


def token_counter(encoding: str, tokenizer: PreTrainedTokenizerBase) -> CountTokens:
    """Counts the tokens of a text.

    Args:
        encoding: of tiktoken, or OWN.
        tokenizer: the model's.

    Raises:
        MachineError: tiktoken's vocabulary is neither in its cache nor can be fetched.
    """
    if encoding == OWN:

        def count(text: str) -> int:
            ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False)
            return len(ids)

        return count
    try:
        encoder = tiktoken.get_encoding(encoding)
    except (RequestException, OSError, ValueError) as error:
        raise MachineError(
            f"tiktoken has no vocabulary {encoding} here and cannot fetch it ({type(error).__name__}): set "
            f"TIKTOKEN_CACHE_DIR to a cache that has it, or count by the model's tokenizer (--count-tokens {OWN}), "
            "which serves style control only if every answer of the pool is counted so"
        ) from error
    return lambda text: len(encoder.encode(text, disallowed_special=()))
