"""One record of a data source with the place it came from, so that every error can name it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One record and where it stands: `file:line`, or `source row n` where a format has no lines.

    A column that is null is not among its columns: a table that was joined from several has nulls where one of them
    had no such column.

    Example:
        Row(where="prompts.jsonl:1", columns={"prompt": "hello"})
    """

    where: str
    columns: dict[str, object]


@dataclass(frozen=True)
class BadRow:
    """A record that could not be read, among others that can.

    Example:
        BadRow(where="prompts.jsonl:2", problem="not valid JSON")
    """

    where: str
    problem: str


def checked(where: str, value: object) -> Row | BadRow:
    """A record as it was read, if it has columns."""
    if not isinstance(value, dict):
        return BadRow(where, f"found a JSON {type(value).__name__}, expected an object with columns")
    return Row(where, {column: entry for column, entry in value.items() if entry is not None})
