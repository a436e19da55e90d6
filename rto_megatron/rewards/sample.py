"""What a source of rewards sees of a response, and what it gives. Imports nothing heavy: functions run beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

type Json = bool | int | float | str | list[Json] | dict[str, Json] | None
type Given = float | list[float]  # of a response, or of each of its tokens


@dataclass(frozen=True)
class Sample:
    """One response, as functions and services see it.

    Args:
        prompt: as the policy read it, with everything that the chat template wrote.
        response: without special tokens.
        tokens: the text of each response token, with the space before a word where the token has one; a token that ends
            the response is among them.
        columns: everything that the prompt's row of the data has, the prompt itself among it.

    Example:
        Sample("p7", "<user> 2 + 2 =", "4", (1, 529), (88, 2), ("4", "</s>"), "stop", {"answer": "4"})
    """

    prompt_id: str
    prompt: str
    response: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    finish_reason: str
    columns: Mapping[str, Json]


class Rater(Protocol):
    """Rates responses outside the trainer's ranks; one rank of each replica has it.

    Example:
        (score,) = rater.rate([sample])
    """

    def rate(self, samples: Sequence[Sample]) -> list[Given]:
        """What it gives each sample, in their order.

        Raises:
            UserError: it failed, did not answer in time, or gave something else; names the source and the sample.
        """
        ...
