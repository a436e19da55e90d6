"""What the columns of a row say: prompts, conversations, answers, margins and verdicts."""

from collections.abc import Sequence

from rto_megatron.data.chat import Message
from rto_megatron.data.sources import Row
from rto_megatron.errors import UserError


def row_id(row: Row) -> str:
    """The row's own id, else its place in the source."""
    for column in ("prompt_id", "id"):
        if column in row.columns:
            return str(row.columns[column])
    return row.where


def first_column(row: Row, candidates: Sequence[str], what: str) -> str:
    for column in candidates:
        if column in row.columns:
            return column
    raise UserError(
        f"{row.where}: found the columns {sorted(row.columns)}, "
        f"expected one of {list(candidates)} for {what}; rename a column (a null is no column)"
    )


def text(row: Row, column: str) -> str:
    value = row.columns.get(column)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{row.where}: column {column!r} is {value!r:.60}, expected text that is not empty")
    return value


def _messages(row: Row, column: str) -> list[Message]:
    value = row.columns.get(column)
    expected = "expected a list of messages {'role': ..., 'content': ...}"
    if column not in row.columns:
        raise UserError(f"{row.where}: column {column!r} is missing, found {sorted(row.columns)}; {expected}")
    if not isinstance(value, list) or not value:
        raise UserError(f"{row.where}: column {column!r} is {value!r:.60}; {expected}")
    messages = []
    for number, turn in enumerate(value):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{row.where}: message {number} of {column!r} is {turn!r:.60}; {expected}")
        if not content.strip():
            raise UserError(f"{row.where}: message {number} ({role}) of {column!r} is empty; remove the row")
        messages.append(Message(role, content))
    return messages


def prompt_messages(row: Row, column: str) -> list[Message]:
    if column == "prompt" and not isinstance(row.columns.get(column), list):
        return [Message("user", text(row, column))]
    messages = _messages(row, column)
    if messages[-1].role == "assistant":
        raise UserError(
            f"{row.where}: {column!r} ends with an assistant message; a prompt has to end before the answer"
        )
    return messages


def conversation(row: Row, column: str) -> list[Message]:
    messages = _messages(row, column)
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise UserError(
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
        raise UserError(f"{row.where}: column {column!r} is {value!r:.60}, expected a finite number")
    return float(value)


def completed(row: Row) -> list[Message]:
    if isinstance(row.columns.get("completion"), list):
        answer = _messages(row, "completion")[-1].content
    else:
        answer = text(row, "completion")
    return [*prompt_messages(row, "prompt"), Message("assistant", answer)]


def label(row: Row) -> bool:
    label = row.columns["label"]
    if not isinstance(label, bool):
        raise UserError(f"{row.where}: column 'label' is {label!r:.60}, expected true or false")
    return label
