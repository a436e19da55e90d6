"""What the columns of a row say: prompts, conversations, answers, margins and verdicts."""

import json
import re
from collections.abc import Sequence

from rto_megatron.data.messages import Message
from rto_megatron.data.row import Row
from rto_megatron.data.soundness import require_characters
from rto_megatron.data.turns import require_prompt, turns, with_system
from rto_megatron.errors import DataError
from rto_megatron.types import Columns

# A list of messages, as JSON or Python writes it.
_WRITTEN_TURNS = re.compile(
    r"""\s*\[\s*\{\s*(["'])(role|content)\1\s*:.*["'](?!\2)(?:role|content)["']\s*:.*\]\s*""", re.DOTALL
)


def row_id(row: Row) -> str:
    """The row's own id, else its place in the source; an empty text is no id.

    Raises:
        DataError: half of a character stands in it.
    """
    for column in ("prompt_id", "id"):
        if named := str(row.columns.get(column, "")):
            return require_characters(named, row.where)
    return row.where


def json_columns(row: Row) -> Columns:
    """The columns that JSON can hold, as it gives them back; a date or bytes are no such columns."""
    found = {}
    for column, value in row.columns.items():
        try:
            found[column] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return found


def first_column(row: Row, candidates: Sequence[str], what: str) -> str:
    for column in candidates:
        if column in row.columns:
            return column
    raise DataError(
        f"{row.where}: found the columns {sorted(row.columns)}, "
        f"expected one of {list(candidates)} for {what}; rename a column (a null is no column)"
    )


def text(row: Row, column: str) -> str:
    value = row.columns.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{row.where}: column {column!r} is {value!r:.60}, expected text that is not empty")
    return value


def is_transcript(value: object) -> bool:
    """Whether a value is a text of 'Human: ... Assistant: ...'."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def _spoken(row: Row, column: str) -> str:
    """The text of one turn.

    Raises:
        DataError: it is empty, or holds a list of messages.
    """
    said = text(row, column)
    if _WRITTEN_TURNS.fullmatch(said):
        raise DataError(
            f"{row.where}: column {column!r} is a list of messages written as text ({said!r:.40}), which would be read "
            "as what one of them says; give the list itself"
        )
    return said


def prompt_messages(row: Row, column: str) -> list[Message]:
    if column == "prompt" and not isinstance(row.columns.get(column), list):
        asked = _spoken(row, column)
        if is_transcript(asked):
            raise DataError(
                f"{row.where}: column 'prompt' is a transcript ({asked!r:.40}), which would be read as one turn of the "
                "user; give it as a list of messages"
            )
        return with_system(row, [Message("user", asked)])
    messages = turns(row, column)
    if messages[-1].role == "assistant":
        raise DataError(
            f"{row.where}: {column!r} ends with an assistant message; a prompt has to end before the answer"
        )
    if column != "prompt":
        require_prompt(row, column, messages)
    return with_system(row, messages)


def conversation(row: Row, column: str) -> list[Message]:
    messages = turns(row, column)
    require_answered(row, column, messages)
    require_prompt(row, column, messages[:-1])
    return with_system(row, messages)


def require_answered(row: Row, column: str, messages: list[Message]) -> list[Message]:
    """The messages themselves.

    Raises:
        DataError: they are no prompt and an answer.
    """
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise DataError(
            f"{row.where}: {column!r} has the roles {[message.role for message in messages]}; "
            "expected a prompt and a last message of the assistant"
        )
    return messages


def margin(row: Row) -> float | None:
    """By how much the chosen answer is better; None where the row does not say."""
    columns = row.columns
    if "margin" in columns:
        return _number(row, "margin")
    if "score_chosen" in columns and "score_rejected" in columns:
        return _number(row, "score_chosen") - _number(row, "score_rejected")
    return None


def _number(row: Row, column: str) -> float:
    value = row.columns[column]
    # Half of float32's range, so that a difference of two stays in it; NaN is in no range.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e38:
        raise DataError(f"{row.where}: column {column!r} is {value!r:.60}, expected a finite number")
    return float(value)


def answered(row: Row, prompt: Sequence[Message], column: str) -> list[Message]:
    """The prompt and all turns of the answer in a column, a text or messages, of which the last is the answer."""
    if not isinstance(row.columns.get(column), list):
        return [*prompt, Message("assistant", _spoken(row, column))]
    answer = turns(row, column)
    if answer[-1].role != "assistant":
        raise DataError(
            f"{row.where}: {column!r} has the roles {[message.role for message in answer]}; expected a last "
            "message of the assistant, which is what is learnt or judged"
        )
    return [*prompt, *answer]


def completed(row: Row) -> list[Message]:
    """The columns prompt and completion."""
    return answered(row, prompt_messages(row, "prompt"), "completion")


def label(row: Row) -> bool:
    label = row.columns["label"]
    if not isinstance(label, bool):
        raise DataError(f"{row.where}: column 'label' is {label!r:.60}, expected true or false")
    return label
