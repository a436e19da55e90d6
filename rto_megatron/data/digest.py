"""A fingerprint of what is trained on: a resume with other data would go on as if nothing had happened."""

import hashlib
from array import array
from collections.abc import Sequence

from rto_megatron.types import Demonstration, Example, JudgedResponse, PreferencePair, Prompt


def digest(examples: Sequence[Example]) -> str:
    """sha256 over token ids, margins and verdicts of all examples in their order; their names are not in it."""
    found = hashlib.sha256()
    for example in examples:
        sequences, number = _parts(example)
        found.update(array("d", (number, *map(len, sequences))))
        for ids in sequences:
            found.update(array("i", ids))
    return found.hexdigest()


def _parts(example: Example) -> tuple[tuple[tuple[int, ...], ...], float]:
    match example:
        case Prompt():
            return (example.token_ids,), 0.0
        case Demonstration():
            return (example.prompt_ids, example.response_ids), 0.0
        case PreferencePair():
            return (example.prompt_ids, example.chosen_ids, example.rejected_ids), example.margin
        case JudgedResponse():
            texts = (example.prompt_ids, example.response_ids, example.unrelated_ids)
            return texts, float(example.is_desirable)
