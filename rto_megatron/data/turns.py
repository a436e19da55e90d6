"""The turns of a row and what it says beside them: tools, a system text, arguments of the chat template."""

from collections.abc import Mapping, Sequence

from rto_megatron.config.template_arguments import RESERVED
from rto_megatron.data.messages import (
    CALLS,
    Conversation,
    Message,
    parsed,
    with_parsed_arguments,
    without_nulls,
)
from rto_megatron.data.row import Row
from rto_megatron.errors import DataError

_SYSTEM = ("system", "system_prompt")
_TOOLS = "tools"
_ARGUMENTS = "chat_template_kwargs"  # TRL's name
TEMPLATE_COLUMNS = (_TOOLS, _ARGUMENTS)  # what a row says to the chat template beside its turns
_SPOKEN = ("user", "assistant")  # turns that say something or are none
_UNASKED = ("system", "assistant")
_EXPECTED_TURNS = "expected a list of messages {'role': ..., 'content': ...}"  # and weight, 0 or 1


def turns(row: Row, column: str) -> list[Message]:
    """The messages of a column; fields that are null are absent.

    Raises:
        DataError: there is none, or one has no role, no text, or calls that are no list.
    """
    if column not in row.columns:
        raise DataError(
            f"{row.where}: column {column!r} is missing, found {sorted(row.columns)}; {_EXPECTED_TURNS}"
        )
    return messages_of(row, column, row.columns[column])


def messages_of(row: Row, column: str, value: object) -> list[Message]:
    """The messages of a value that stands in a column, or was made of one.

    Raises:
        DataError: as `turns`.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.where}: column {column!r} is {value!r:.60}; {_EXPECTED_TURNS}")
    messages = []
    for number, turn in enumerate(value):
        message = _message(turn)
        if message is None:
            kinds = _other_kinds(turn)
            what = (
                f"has parts of the types {', '.join(kinds)}; only text is read"
                if kinds
                else f"is {turn!r:.60}"
            )
            raise DataError(f"{row.where}: message {number} of {column!r} {what}; {_EXPECTED_TURNS}")
        if not message.content.strip() and message.role in _SPOKEN and not _calls(message):
            raise DataError(
                f"{row.where}: message {number} ({message.role}) of {column!r} is empty; remove the row"
            )
        messages.append(message)
    return messages


def _message(turn: object) -> Message | None:
    """None: it is no message."""
    present = without_nulls(turn)
    if not isinstance(present, dict):
        return None
    fields = {name: value for name, value in present.items() if name not in ("role", "content")}
    if "tool_calls" in fields:
        calls = parsed(fields.pop("tool_calls"))
        if not isinstance(calls, list):
            return None
        if calls:
            fields["tool_calls"] = [with_parsed_arguments(call) for call in calls]
    weight = fields.pop("weight", 1)
    role = present.get("role")
    content = _content(present.get("content", "" if any(c in fields for c in CALLS) else None))
    if not isinstance(role, str) or not isinstance(content, str) or weight not in (0, 1):
        return None
    return Message(role, content, fields, is_learnt=bool(weight))


def _content(content: object) -> object:
    """Parts of type text as one text, a line each as vLLM joins them for templates that take strings."""
    if not isinstance(content, list):
        return content
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in content
    ]
    return "\n".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None


def _other_kinds(turn: object) -> list[str]:
    """The types of a turn's parts that are no text."""
    content = turn.get("content") if isinstance(turn, dict) else None
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    return sorted({str(part.get("type")) for part in parts} - {"text"})


def _calls(message: Message) -> bool:
    return any(name in message.fields for name in CALLS)


def with_system(row: Row, messages: Sequence[Message]) -> list[Message]:
    """The messages, after a turn with the text of the row's column `system`, if it has one; a blank text is none.

    Raises:
        DataError: the column holds no text, its other name another one, or the messages begin with another system turn.
    """
    named = [name for name in _SYSTEM if not _is_blank(row.columns.get(name))]
    if not named:
        return list(messages)
    column, *others = named
    content = row.columns[column]
    if any(row.columns[name] != content for name in others):
        raise DataError(
            f"{row.where}: columns {' and '.join(map(repr, named))} say different things ({content!r:.40} and "
            f"{row.columns[others[0]]!r:.40}); keep one"
        )
    if not isinstance(content, str):
        raise DataError(f"{row.where}: column {column!r} is {content!r:.60}, expected text")
    if messages[0].role != "system":
        return [Message("system", content), *messages]
    if messages[0].content != content:
        raise DataError(
            f"{row.where}: column {column!r} is {content!r:.60}, and the messages begin with the system turn "
            f"{messages[0].content!r:.60}; keep one"
        )
    return list(messages)


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def require_prompt(row: Row, column: str, messages: Sequence[Message]) -> None:
    """Refuses a row whose column `prompt` is not what its conversation answers.

    A text agrees that is one of the user's turns, or holds the texts of all turns.

    Raises:
        DataError: names both.
    """
    prompt = row.columns.get("prompt")
    if prompt is None:
        return
    if isinstance(prompt, list):
        is_same = turns(row, "prompt") == list(messages)
    else:
        said = _words(str(prompt))
        texts = [_words(message.content) for message in messages]
        asked = [text for message, text in zip(messages, texts, strict=True) if message.role not in _UNASKED]
        is_same = said in asked or (len(texts) > 1 and all(text in said for text in texts))
    if not is_same:
        raise DataError(
            f"{row.where}: column 'prompt' is {prompt!r:.80}, and {column!r} answers "
            f"{[message.turn() for message in messages]!r:.80}; make them agree, or remove the column 'prompt'"
        )


def _words(text: str) -> str:
    return " ".join(text.split())


def conversation_of(row: Row, messages: Sequence[Message]) -> Conversation:
    """The messages with the row's columns `tools` and `chat_template_kwargs`; JSON text in them is read."""
    return Conversation(tuple(messages), _tools(row), _arguments(row))


def _tools(row: Row) -> tuple[dict[str, object], ...]:
    value = _decoded(row, _TOOLS)
    tools = [parsed(tool) for tool in value] if isinstance(value, list) else value
    if tools is None or tools == "":
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{row.where}: column {_TOOLS!r} is {row.columns[_TOOLS]!r:.60}, expected a list of JSON schemas "
            "{'type': 'function', 'function': {...}}"
        )
    return tuple(tools)


def _arguments(row: Row) -> Mapping[str, object]:
    value = _decoded(row, _ARGUMENTS)
    if value is None:
        return {}
    if not isinstance(value, dict) or any(name in RESERVED for name in value):
        raise DataError(
            f"{row.where}: column {_ARGUMENTS!r} is {value!r:.60}, expected a mapping of arguments that the chat "
            f"template reads, without {', '.join(RESERVED)}"
        )
    return value


def _decoded(row: Row, column: str) -> object:
    """A column with JSON text or values; nulls in text were written on purpose."""
    value = row.columns.get(column)
    return parsed(value) if isinstance(value, str) else without_nulls(value)
