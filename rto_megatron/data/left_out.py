"""What a chat template leaves out of a conversation.

A template renders what it was written for and drops the rest without a word: turns of unknown roles, tools, calls,
reasoning. Something counts as rendered if a word that is put into it shows in the text, or if the text changes when
it is left out. That needs one more rendering, with a word in everything, unless all turns stand in the text as they
are.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from rto_megatron.data.messages import CALLS, REASONING, Conversation, Message
from rto_megatron.data.template import ChatTemplate
from rto_megatron.data.thoughts import split_thought
from rto_megatron.errors import DataError, UserError

_ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = ("role", "content", *CALLS, *REASONING, "name", "tool_call_id")

_NO_COINCIDENCE = 12  # characters

type _Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Part:
    """Something of a conversation that carries text.

    Attributes:
        path: ("tools", number), or ("messages", number, field, ...).
        piece: of the text there: a thought in it, what follows that, or all.

    Example:
        Part(("messages", 1, "content"), piece="thought").turn == 1
    """

    path: _Path
    piece: Literal["all", "thought", "rest"] = "all"

    @property
    def turn(self) -> int | None:
        """None for tools, which belong to the whole conversation."""
        return int(self.path[1]) if self.path[0] == "messages" else None

    @property
    def is_reasoning(self) -> bool:
        """Templates of reasoning models leave it out of finished turns on purpose."""
        return self.piece == "thought" or (self.turn is not None and self.path[2] in REASONING)


def left_out(
    template: ChatTemplate,
    conversation: Conversation,
    text: str,
    with_header: bool,
    where: str,
    trained: Collection[int] = (),
) -> list[Part]:
    """What is not in the rendered conversation.

    Looked for are tools, the contents, calls and reasoning of all turns, and every field of the trained turns; what is
    empty cannot be lost.

    Args:
        text: the conversation as `template` renders it.
        trained: numbers of the trained turns.
    """

    def rendered(tree: dict[str, object]) -> str | None:
        try:
            return template.text(_conversation(tree, conversation), with_header, where)
        except UserError:
            return None  # the template looks at it, and does not take it

    if _stands_in(template, conversation, text):
        return []
    tree = _tree(conversation)
    parts = list(_parts(conversation, trained))
    words = _words(text, len(parts))
    marked = tree
    for part, word in zip(parts, words, strict=True):
        marked = _changed(marked, part, partial(_marked, word=word))
    marked_text = rendered(marked) or ""
    absent = [part for part, word in zip(parts, words, strict=True) if word not in marked_text]
    return [part for part in absent if rendered(_changed(tree, part, _emptied(part))) == text]


def _stands_in(template: ChatTemplate, conversation: Conversation, text: str) -> bool:
    """Whether the turns of a plain conversation stand in the text one behind another, each of them too long for the
    template to have written by itself: then nothing is lost, and no other rendering is needed to know."""
    if conversation.tools or conversation.arguments or template.options.arguments or template.prints_date:
        return False
    place = 0
    for message in conversation.messages:
        content = message.content.strip()
        if len(content) < _NO_COINCIDENCE or message.fields or split_thought(content).closing:
            return False
        place = text.find(content, place)
        if place < 0 or content in template.source:
            return False
        place += len(content)
    return True


def refuse(template: ChatTemplate, conversation: Conversation, lost: Sequence[Part], where: str) -> None:
    """Refuses a row of which the template leaves something out.

    Raises:
        DataError: names what is lost and what the template renders.
    """
    if not lost:
        return
    names = dict.fromkeys(_name(part, conversation) for part in lost)
    turns = any(part.turn is not None and part.path[2] == "content" and part.piece == "all" for part in lost)
    fields = any(part.turn is not None and part.path[2] != "content" for part in lost)
    knows = [
        *([f"it renders the roles {', '.join(_rendered_roles(template, where))}"] if turns else []),
        *([f"of a turn it reads {', '.join(template.read_fields(_FIELDS))}"] if fields else []),
        *(["it reads no tools"] if "tools" not in template.variables and lost[0].turn is None else []),
    ]
    raise DataError(
        f"{where}: the tokenizer's chat template leaves out {', '.join(names)}"
        + "".join(f"; {sentence}" for sentence in knows)
        + ": change the data, or take a template that renders it"
    )


def _name(part: Part, conversation: Conversation) -> str:
    if part.turn is None:
        return "the tools"
    turn = f"message {part.turn} ({conversation.messages[part.turn].role})"
    if part.piece == "thought":
        return f"the reasoning in the content of {turn}"
    return turn if part.path[2] == "content" else f"{part.path[2]!r} of {turn}"


def _parts(conversation: Conversation, trained: Collection[int]) -> Iterator[Part]:
    yield from (Part(("tools", number)) for number in range(len(conversation.tools)))
    for number, message in enumerate(conversation.messages):
        place: _Path = ("messages", number)
        reply = split_thought(message.content if message.role == "assistant" else "")
        if reply.thought.strip():
            yield Part((*place, "content"), "thought")
        if reply.closing and reply.rest.strip():
            yield Part((*place, "content"), "rest")
        if not reply.closing and message.content.strip():
            yield Part((*place, "content"))
        for name, value in message.fields.items():
            if name == "tool_calls" and isinstance(value, list):
                yield from (Part((*place, name, *inner)) for inner in _calls(value))
            elif _is_empty(value):
                continue
            elif name in CALLS or name in REASONING or number in trained:
                yield Part((*place, name))


def _calls(calls: list[object]) -> Iterator[_Path]:
    for number, call in enumerate(calls):
        if not isinstance(call, dict):
            continue
        inner = call.get("function")
        path, function = ((number, "function"), inner) if isinstance(inner, dict) else ((number,), call)
        yield from ((*path, key) for key in ("name", "arguments") if not _is_empty(function.get(key)))


def _is_empty(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | dict) and not value)


def _words(text: str, count: int) -> list[str]:
    """Different words that the text does not hold."""
    number = 0
    while f"Qx{number}q" in text:
        number += 1
    return [f"Qx{number}q{index}z" for index in range(count)]


def _marked(value: object, word: str) -> object:
    """With a word in the middle of its text, because templates look at how texts begin and end."""
    if isinstance(value, str) and value.strip():
        middle = (len(value) - len(value.lstrip())) + (len(value.strip()) + 1) // 2
        return value[:middle] + word + value[middle:]
    if isinstance(value, dict):
        for key in sorted(value, key=lambda key: key not in ("function", "name")):
            if (inner := _marked(value[key], word)) != value[key]:
                return {**value, key: inner}
    return value


def _emptied(part: Part) -> Callable[[object], object]:
    """What is left where a part is left out; None: nothing."""
    is_kept = part.turn is not None and part.path[2] in ("content", "tool_calls")
    return lambda value: ({} if isinstance(value, dict) else "") if is_kept else None


def _tree(conversation: Conversation) -> dict[str, object]:
    messages = [{"role": m.role, "content": m.content, **m.fields} for m in conversation.messages]
    return {"messages": messages, "tools": list(conversation.tools)}


def _conversation(tree: dict[str, object], source: Conversation) -> Conversation:
    turns, tools = tree["messages"], tree["tools"]
    assert isinstance(turns, list)
    assert isinstance(tools, list)
    messages = (
        Message(
            turn["role"], turn["content"], {k: v for k, v in turn.items() if k not in ("role", "content")}
        )
        for turn in turns
    )
    return Conversation(tuple(messages), tuple(tools), source.arguments)


def _changed(tree: dict[str, object], part: Part, change: Callable[[object], object]) -> dict[str, object]:
    def piece(value: object) -> object:
        if part.piece == "all":
            return change(value)
        reply = split_thought(str(value))
        if part.piece == "thought":
            return replace(reply, thought=str(change(reply.thought))).text
        return replace(reply, rest=str(change(reply.rest))).text

    changed = _at(tree, part.path, piece)
    assert isinstance(changed, dict)
    return changed


def _at(value: object, path: _Path, change: Callable[[object], object]) -> object:
    """A copy that is changed at one place; what becomes None there is removed."""
    if not path:
        return change(value)
    key, *rest = path
    if isinstance(value, list):
        assert isinstance(key, int)
        inner = _at(value[key], tuple(rest), change)
        return [*value[:key], *([] if inner is None else [inner]), *value[key + 1 :]]
    assert isinstance(value, dict)
    inner = _at(value[key], tuple(rest), change)
    others = {name: entry for name, entry in value.items() if name != key}
    return (
        others if inner is None else {name: inner if name == key else entry for name, entry in value.items()}
    )


def _rendered_roles(template: ChatTemplate, where: str) -> list[str]:
    """Roles of which a turn shows in some place of a small conversation."""
    user, assistant = Message("user", "u"), Message("assistant", "a")

    def shows(role: str) -> bool:
        turn = Message(role, "Qx0q")
        for turns in ((turn, user), (user, turn), (user, assistant, turn)):
            try:
                if turn.content in template.text(Conversation(turns), False, where):
                    return True
            except UserError:
                continue
        return False

    return [role for role in _ROLES if shows(role)]
