"""A tokenizer's chat template, with the arguments and the date of a run."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Literal

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes, parser
from transformers import PreTrainedTokenizerBase

from rto_megatron.data.messages import Conversation, Turn, with_argument_text
from rto_megatron.data.soundness import require_characters
from rto_megatron.errors import DataError, TokenizerError

_CLOCK = "strftime_now"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
# What transformers gives to every template, beside the special tokens.
_ALWAYS = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", _CLOCK}


@dataclass(frozen=True)
class TemplateOptions:
    """What a run decides about the chat template.

    Attributes:
        arguments: of the template, for all rows.
        moment: when the run started, for templates that print the date; None: they print the clock's.
        open_thought: what happens to an answer that does not close the thought which the generation prompt opens.
        allow_non_prefix: take templates whose rendered prompt is not how the rendered conversation begins.

    Example:
        TemplateOptions(arguments={"enable_thinking": False}, open_thought="keep")
    """

    arguments: Mapping[str, object] = field(default_factory=dict)
    moment: datetime | None = None
    open_thought: Literal["error", "keep"] = "error"
    allow_non_prefix: bool = False


class _Generation(jinja2.ext.Extension):
    """transformers' tag around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 -- as jinja2 declares it

    def parse(self, parser: parser.Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass
class _LatestPrompt:
    """What was rendered last with a header: the answers of a pair stand in one file behind another."""

    conversation: Conversation | None = None
    text: str = ""
    ids: tuple[int, ...] = ()


class _RefusedError(Exception):
    """A template that cannot render what it was given, in its own words."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations.

    Raises:
        UserError: the template is no Jinja, or `options.arguments` has a name that it does not read.

    Example:
        ChatTemplate(tokenizer).text(conversation, with_header=True, where="prompts.jsonl:1")
    """

    tokenizer: PreTrainedTokenizerBase
    options: TemplateOptions = TemplateOptions()
    _latest: _LatestPrompt = field(default_factory=_LatestPrompt, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._refuse_unread(self.options.arguments, "data.template")

    def text(self, conversation: Conversation, with_header: bool, where: str) -> str:
        """The rendered conversation; with a header, it waits for the assistant's turn.

        A template that cannot render tool calls as transformers documents them (arguments as a mapping, no content)
        gets them as OpenAI's interface writes them (arguments as JSON text, null content).

        Raises:
            DataError: the template refuses the conversation, or does not read the row's arguments.
        """
        return self._attempt(
            conversation, where, lambda turns: self._rendered(turns, conversation, with_header)
        )

    def prompt(
        self, conversation: Conversation, encode: Callable[[str], tuple[int, ...]], where: str
    ) -> tuple[str, tuple[int, ...]]:
        """The rendered conversation with a header, and its ids; the same one is not rendered twice in a row.

        Raises:
            DataError: as `text`.
        """
        if conversation != self._latest.conversation:
            text = self.text(conversation, True, where)
            self._latest.text, self._latest.ids = text, encode(text)
            self._latest.conversation = conversation
        return self._latest.text, self._latest.ids

    def assistant_mask(self, conversation: Conversation, where: str) -> tuple[list[int], list[int]]:
        """transformers' token ids of the conversation, and 1 for each that the template marks as the assistant's.

        Raises:
            DataError: as `text`.
        """

        def masked(turns: list[Turn]) -> tuple[list[int], list[int]]:
            encoded = self._apply(
                turns, conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            assert isinstance(encoded, Mapping)
            return [*encoded["input_ids"]], [*encoded["assistant_masks"]]

        return self._attempt(conversation, where, masked)

    def _attempt[T](self, conversation: Conversation, where: str, render: Callable[[list[Turn]], T]) -> T:
        """With the turns as the template takes them."""
        self._refuse_unread(conversation.arguments, f"{where}: column chat_template_kwargs")
        turns = [message.turn() for message in conversation.messages]
        for message in conversation.messages:
            require_characters(message.content, where)
        try:
            return render(turns)
        except _RefusedError as refusal:
            if any("tool_calls" in turn for turn in turns):
                try:
                    return render([_openai(turn) for turn in turns])
                except _RefusedError:
                    pass  # the first refusal is of the documented form
            raise DataError(
                f"{where}: the tokenizer's chat template refuses the roles {conversation.roles} ({refusal}); change "
                "the data or the template"
            ) from refusal

    @cached_property
    def marks_turns(self) -> bool:
        """Whether it marks what the assistant writes, as transformers' masks need it."""
        texts = self._texts()
        return bool(texts) and all(_GENERATION.search(text) for text in texts)

    @cached_property
    def variables(self) -> frozenset[str]:
        """What the template reads and does not set itself."""
        return frozenset(name for tree in self._trees for name in jinja2.meta.find_undeclared_variables(tree))

    @cached_property
    def source(self) -> str:
        """All that it is written in."""
        return "\n".join(self._texts())

    @property
    def prints_date(self) -> bool:
        """Whether it asks for the date, so that its text depends on the day."""
        return _CLOCK in self.variables

    def read_fields(self, names: Collection[str]) -> list[str]:
        """Those of `names` that the template reads, of anything."""
        return [name for name in names if name in self._attributes]

    @cached_property
    def _attributes(self) -> frozenset[object]:
        found = (
            _attribute(node) for tree in self._trees for node in tree.find_all((nodes.Getattr, nodes.Getitem))
        )
        return frozenset(found)

    @cached_property
    def _trees(self) -> tuple[nodes.Template, ...]:
        environment = jinja2.Environment(extensions=[_Generation, jinja2.ext.loopcontrols])
        try:
            return tuple(environment.parse(text) for text in self._texts())
        except jinja2.TemplateSyntaxError as error:
            raise _no_jinja(error) from error

    def _texts(self) -> Sequence[str]:
        """One template, or several by name, of which transformers takes `tool_use` for rows with tools."""
        template = self.tokenizer.chat_template
        if template is None:
            return ()
        return [template] if isinstance(template, str) else list(template.values())

    def _refuse_unread(self, arguments: Mapping[str, object], what: str) -> None:
        if not arguments or not (unread := sorted(arguments.keys() - self.variables)):
            return
        known = sorted(self.variables - _ALWAYS - self.tokenizer.special_tokens_map.keys())
        raise DataError(
            f"{what}: the tokenizer's chat template does not read {', '.join(unread)}; it reads "
            f"{', '.join(known) or 'no argument'}: remove what has no effect"
        )

    def _rendered(self, turns: list[Turn], conversation: Conversation, with_header: bool) -> str:
        return str(self._apply(turns, conversation, tokenize=False, add_generation_prompt=with_header))

    def _apply(self, turns: list[Turn], conversation: Conversation, **how: bool) -> object:
        arguments = {**self.options.arguments, **conversation.arguments}
        if self.options.moment is not None and self.prints_date:
            arguments[_CLOCK] = self.options.moment.strftime  # takes the place of transformers' own
        # Its signature names strings, where templates take any value.
        render: Callable[..., object] = self.tokenizer.apply_chat_template
        try:
            return render(turns, tools=list(conversation.tools) or None, **how, **arguments)
        except jinja2.TemplateSyntaxError as error:
            raise _no_jinja(error) from error
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise _RefusedError(str(error)) from error


def _no_jinja(error: jinja2.TemplateSyntaxError) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer's chat template is no Jinja template (line {error.lineno}: {error}); take the one of the "
        "model's publisher"
    )


def _openai(turn: Turn) -> Turn:
    calls = turn.get("tool_calls")
    if not isinstance(calls, list):
        return turn
    return {"content": None, **turn, "tool_calls": [with_argument_text(call) for call in calls]}


def _attribute(node: nodes.Node) -> object:
    if isinstance(node, nodes.Getattr):
        return node.attr
    assert isinstance(node, nodes.Getitem)
    return node.arg.value if isinstance(node.arg, nodes.Const) else None
