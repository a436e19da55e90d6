"""Conversations in the layouts of other projects: Alpaca, ShareGPT, the transcripts of HH, questions with answers.

Source: LLaMA-Factory, data/README.md (Alpaca's input follows its instruction on a new line; history; ShareGPT's
roles); Anthropic, hh-rlhf (transcripts).
"""

import re

from rto_megatron.data.messages import Message
from rto_megatron.data.reading import Cells
from rto_megatron.data.row import Row
from rto_megatron.data.rows import is_transcript, require_answered, text
from rto_megatron.data.turns import messages_of, require_prompt, with_system
from rto_megatron.errors import DataError

_SPEAKERS = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool"), "tool"),
    "system": "system",
}
_FLAGS = ("weight", "loss", "train")  # of a turn: whether it is learnt


def has_sharegpt_turns(value: object) -> bool:
    """Whether a value is a list of ShareGPT's turns."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and {"from", "value"} <= value[0].keys()
    )


def conversations_column(cells: Cells) -> str:
    """The name under which ShareGPT's turns stand."""
    return "conversation" if "conversations" not in cells and "conversation" in cells else "conversations"


def sharegpt(row: Row) -> list[Message]:
    """A ShareGPT conversation, or messages in the same column, whose last turn is the assistant's."""
    column = conversations_column(row.columns)
    value = row.columns[column]
    if has_sharegpt_turns(value):
        assert isinstance(value, list)
        value = [_turn(row, column, number, turn) for number, turn in enumerate(value)]
    messages = require_answered(row, column, messages_of(row, column, value))
    require_prompt(row, column, messages[:-1])
    return with_system(row, messages)


def _turn(row: Row, column: str, number: int, turn: object) -> dict[str, object]:
    where = f"{row.where}: turn {number} of {column!r}"
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise DataError(f"{where} is {turn!r:.60}; expected {{'from': ..., 'value': '...'}}")
    role = _SHAREGPT_ROLES.get(str(turn.get("from")))
    if role is None:
        raise DataError(
            f"{where} is from {turn.get('from')!r:.60}; known are {', '.join(_SHAREGPT_ROLES)}: rename it, or write "
            "the conversation as messages, where calls of tools stand in tool_calls"
        )
    plain: dict[str, object] = {"role": role, "content": turn["value"]}
    flag = next((turn[name] for name in _FLAGS if turn.get(name) is not None), None)
    return plain if flag is None or role != "assistant" else {**plain, "weight": flag}


def alpaca_prompt(row: Row) -> list[Message]:
    """Alpaca's earlier turns and instruction, with its input on a new line."""
    asked = text(row, "instruction")
    given = row.columns.get("input", "")
    if not isinstance(given, str):
        raise DataError(f"{row.where}: column 'input' is {given!r:.60}, expected text")
    if given.strip():
        asked = f"{asked}\n{given}"
    return with_system(row, [*_history(row), Message("user", asked)])


def _history(row: Row) -> list[Message]:
    value = row.columns.get("history", [])
    if not isinstance(value, list) or not all(isinstance(t, list) and len(t) == 2 for t in value):
        raise DataError(
            f"{row.where}: column 'history' is {value!r:.60}, expected a list of [instruction, answer]"
        )
    turns = [
        {"role": role, "content": said}
        for exchange in value
        for role, said in zip(("user", "assistant"), exchange, strict=True)
    ]
    return messages_of(row, "history", turns) if turns else []


def question(row: Row) -> list[Message]:
    """The prompt of a row that asks in its column question."""
    return with_system(row, [Message("user", text(row, "question"))])


def transcript(row: Row, column: str) -> list[Message]:
    """The turns of a transcript, whose last is the assistant's.

    Raises:
        DataError: it begins or ends with something else.
    """
    said = row.columns.get(column)
    if not isinstance(said, str) or not is_transcript(said):
        raise DataError(
            f"{row.where}: column {column!r} is {said!r:.60}, expected a transcript 'Human: ...', a blank line, "
            "'Assistant: ...', as the other column is"
        )
    before, *pieces = _SPEAKERS.split("\n\n" + said.strip())
    assert not before
    turns = [
        {"role": _TRANSCRIPT_ROLES[speaker], "content": words.strip()}
        for speaker, words in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    messages = messages_of(row, column, turns)
    if messages[-1].role != "assistant":
        raise DataError(f"{row.where}: the transcript in {column!r} does not end with the assistant's turn")
    require_prompt(row, column, messages[:-1])
    return with_system(row, messages)
