"""Public layouts that are not read, recognised so that their refusal can name them."""

from typing import Literal, TypeGuard

from rto_megatron.data.sources import Row
from rto_megatron.errors import DataError, UserError

Examples = Literal["prompts", "pairs", "demonstrations", "judgements", "texts"]

_MESSAGES = "a list of {'role': ..., 'content': '...'}"
_COLUMNS: dict[Examples, str] = {
    "prompts": f"a column prompt, a string or {_MESSAGES}",
    "pairs": f"columns chosen and rejected, each {_MESSAGES} that begins with the prompt",
    "demonstrations": f"a column messages, {_MESSAGES}",
    "judgements": f"columns prompt and completion, each a string or {_MESSAGES}, and label, true or false",
    "texts": "a column text, a string",
}
_CONVERSATIONS = ("messages", "prompt", "context_messages", "chosen", "rejected", "completion")


def name_layout(row: Row, wanted: Examples, error: UserError) -> UserError:
    """The error of a row that could not be read, with the layout that it is in where that is a known one."""
    layout = _layout(row.columns, wanted)
    if layout is None:
        return error
    return DataError(
        f"{row.where}: this looks like {layout}, which is not read; write {_COLUMNS[wanted]} (docs/methods.md, Layouts "
        "of data)"
    )


def _layout(columns: dict[str, object], wanted: Examples) -> str | None:
    names = columns.keys()
    conversations = columns.get("conversations", columns.get("conversation"))
    if _has_turns_with(conversations, "from", "value"):
        return "ShareGPT's layout (conversations of from and value)"
    if {"instruction", "output"} <= names:
        return "Alpaca's layout (instruction, input, output)"
    if any(_has_parts(columns.get(column)) for column in _CONVERSATIONS):
        return "a conversation whose contents are lists of parts, such as {'type': 'text', 'text': ...}"
    if {"chosen", "rejected"} <= names:
        return _pair_layout(columns)
    if {"prompt", "completion"} <= names and wanted == "demonstrations":
        return "TRL's prompt + completion layout"
    return None


def _pair_layout(columns: dict[str, object]) -> str | None:
    chosen = columns["chosen"]
    if isinstance(chosen, str) and isinstance(columns["rejected"], str):
        if "Human:" in chosen and "Assistant:" in chosen:
            return "a transcript as those of HH ('Human: ... Assistant: ...')"
        if "question" in columns:
            return "Orca's layout (system, question, chosen and rejected strings)"
        return "a preference pair of strings (prompt, chosen, rejected)"
    if _has_turns_with(chosen, "role") and chosen[0]["role"] == "assistant":
        return "TRL's preference layout (a prompt, and chosen and rejected without it)"
    return None


def _has_turns_with(value: object, *keys: str) -> TypeGuard[list[dict[str, object]]]:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and {*keys} <= value[0].keys()
    )


def _has_parts(value: object) -> bool:
    return isinstance(value, list) and any(
        isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in value
    )
