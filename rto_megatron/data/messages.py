"""Conversations as rows hold them, in the shape that transformers' chat templates take."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

type Turn = dict[str, object]

CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        content: empty where the row has none.
        fields: what the turn has beside role and content, such as `tool_calls`; none is null.
        is_learnt: False where the row gives the turn the weight 0, as OpenAI's and ShareGPT's layouts can.

    Example:
        Message(role="user", content="hello").turn()
    """

    role: str
    content: str
    fields: Mapping[str, object] = field(default_factory=dict)
    is_learnt: bool = True

    def turn(self) -> Turn:
        """The turn as a template takes it; one that calls tools and says nothing has no content."""
        says_nothing = not self.content and any(name in self.fields for name in CALLS)
        content: Turn = {} if says_nothing else {"content": self.content}
        return {"role": self.role, **content, **self.fields}


@dataclass(frozen=True)
class Conversation:
    """Turns, and what a row says beside them to the template.

    Attributes:
        tools: JSON schemas of what the assistant may call.
        arguments: of the template, for this row alone.

    Example:
        Conversation((Message("user", "2 + 2?"), Message("assistant", "4"))).prompt
    """

    messages: tuple[Message, ...]
    tools: tuple[Turn, ...] = ()
    arguments: Mapping[str, object] = field(default_factory=dict)

    @property
    def prompt(self) -> "Conversation":
        """Without the last turn."""
        return replace(self, messages=self.messages[:-1])

    @property
    def text(self) -> str:
        """What all turns say."""
        return "\n".join(message.content for message in self.messages)

    @property
    def roles(self) -> list[str]:
        """The roles of all turns, for messages."""
        return [message.role for message in self.messages]


def without_nulls(value: object) -> object:
    """A value without the null entries of its mappings, at any depth: parquet fills in null what a row lacks."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def with_parsed_arguments(call: object) -> object:
    """A tool call whose arguments are a mapping, as transformers documents them, where they are JSON text of one."""
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return {**call, "function": with_parsed_arguments(call["function"])}
    arguments = parsed(call.get("arguments"))
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def with_argument_text(call: object) -> object:
    """A tool call whose arguments are JSON text, as OpenAI's interface writes them."""
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return {**call, "function": with_argument_text(call["function"])}
    arguments = call.get("arguments")
    is_mapping = isinstance(arguments, dict)
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)} if is_mapping else call


def parsed(value: object) -> object:
    """The value of JSON text, as files store what has no fixed columns; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        parsed_value: object = json.loads(value)
    except json.JSONDecodeError:
        return value
    return parsed_value
