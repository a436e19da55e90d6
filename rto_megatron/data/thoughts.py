"""Reasoning that stands inside an answer's text, as R1 and Qwen3 write it: `<think>...</think>` before the answer."""

import re
from dataclasses import dataclass

_TAG = r"(?:\w+:)?(?:think|thought|reason)\w*"
_OPENED = re.compile(rf"<({_TAG})>(\s*)\Z")
_EMPTY = re.compile(rf"<({_TAG})>\s*</\1>\s*")
_EMPTY_REST = re.compile(rf"\s*</{_TAG}>\s*")
_PARTS = re.compile(rf"((?:\s*<{_TAG}>)*)(.*)(</{_TAG}>)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """The text of an assistant's turn, cut at its last closing tag; without one, all of it is `rest`.

    Example:
        Reply(opening="<think>", thought="add them", closing="</think>", rest="4").text
    """

    opening: str  # tags
    thought: str
    closing: str  # tag
    rest: str

    @property
    def text(self) -> str:
        """The whole."""
        return f"{self.opening}{self.thought}{self.closing}{self.rest}"


@dataclass(frozen=True)
class Answer:
    """What is to follow a rendered prompt.

    Attributes:
        text: with what the template writes behind the answer; the bare answer where `is_apart`.
        is_apart: the rendered prompt is not how the rendered conversation begins.
        is_open: the prompt opens a thought that the text does not close.
        has_thought_back: the template had left the thought out of the conversation, and the prompt asks for one.

    Example:
        Answer("4", is_apart=True)
    """

    text: str
    is_apart: bool = False
    is_open: bool = False
    has_thought_back: bool = False


def split_thought(content: str) -> Reply:
    """The parts of an assistant's text."""
    match = _PARTS.fullmatch(content)
    return Reply(*match.groups()) if match else Reply("", "", "", content)


def answer_after(prompt_text: str, whole_text: str, content: str) -> Answer:
    """The text that follows a rendered prompt in the rendered conversation.

    Where the prompt ends with an opened thought, its tag is never written twice, and a thought that the template
    leaves out of finished turns is put back.

    Args:
        prompt_text: rendered with a generation header.
        whole_text: rendered with the answer.
        content: of the answer.
    """
    opened = _OPENED.search(prompt_text)
    before = prompt_text[: opened.start()] if opened else prompt_text
    if not whole_text.startswith(before):
        return Answer(content, is_apart=True)
    rest = whole_text[len(before) :]
    if opened is None:
        return Answer(rest)
    tag, space = opened.groups()
    while rest.lstrip().startswith(f"<{tag}>"):
        rest = rest.lstrip().removeprefix(f"<{tag}>").removeprefix(space)
    is_open = leaves_thought_open(prompt_text, rest)
    closing, reply = f"</{tag}>", split_thought(content)
    if is_open and reply.closing == closing:
        indent = reply.rest[: len(reply.rest) - len(reply.rest.lstrip())]
        whole = reply.thought.removeprefix(space) + closing + indent + rest.lstrip()
        return Answer(whole, has_thought_back=True)
    return Answer(rest, is_open=is_open)


def leaves_thought_open(prompt_text: str, answer_text: str) -> bool:
    """Whether a prompt opens a thought that the text behind it does not close."""
    opened = _OPENED.search(prompt_text)
    return opened is not None and f"</{opened[1]}>" not in answer_text


def empty_thoughts(text: str) -> list[tuple[int, int]]:
    """Where thoughts without a word stand in a text, with the space behind them: first character and end."""
    return [found.span() for found in _EMPTY.finditer(text)]


def leading_empty_thought(prompt_text: str, answer_text: str) -> str:
    """The beginning of an answer that is a thought without a word, or the end of one that the prompt opens."""
    pattern = _EMPTY_REST if _OPENED.search(prompt_text) else _EMPTY
    found = pattern.match(answer_text)
    return found[0] if found else ""
