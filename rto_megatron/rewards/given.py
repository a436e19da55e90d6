"""What sources give, read: numbers for responses, for tokens, or for stretches of tokens."""

from collections.abc import Sequence
from typing import Literal

from rto_megatron.errors import RewardError
from rto_megatron.rewards.sample import Given, Sample

Pays = Literal["response", "tokens", "spans"]
_EXPECTED = {
    "response": "one number",
    "tokens": "a list of one number for each of the {count} tokens of the response",
    "spans": "a list of [first, end, number] with 0 <= first < end <= {count}, the tokens of the response",
}
_SHOWN = 5


def read_given(value: object, sample: Sample, pays: Pays, who: str) -> Given:
    """What a source gave a sample, for the response or for each token; spans are paid on their last tokens.

    Numbers may be NaN here, and are refused with those of models.

    Args:
        who: begins the message, as in "rewards.exact: exact.py:score returned".

    Raises:
        RewardError: it is of another type or length; names the sample.
    """
    count = len(sample.response_ids)
    if pays == "response" and is_number(value):
        return float(value)  # type: ignore[arg-type]  # is_number said so
    if pays == "tokens" and isinstance(value, list) and len(value) == count and all(map(is_number, value)):
        return [float(one) for one in value]
    if pays == "spans" and isinstance(value, list) and all(_is_span(one, count) for one in value):
        row = [0.0] * count
        for _, end, number in value:
            row[end - 1] += number
        return row
    found = f"{value!r:.80}" + (f" of length {len(value)}" if isinstance(value, list) else "")
    raise RewardError(
        f"{who} {found} for {sample.prompt_id}, expected {_EXPECTED[pays].format(count=count)}; nothing is trained on"
    )


def listed(ids: Sequence[str]) -> str:
    """Some samples by their ids."""
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return f"{len(ids)} sample{'s' * (len(ids) > 1)}: {', '.join(ids[:_SHOWN])}{more}"


def is_number(value: object) -> bool:
    """Whether it is a number as JSON has it; true and false count as 1 and 0."""
    return isinstance(value, int | float)


def _is_span(value: object, count: int) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(is_number, value)):
        return False
    first, end, _ = value
    return isinstance(first, int) and isinstance(end, int) and 0 <= first < end <= count
