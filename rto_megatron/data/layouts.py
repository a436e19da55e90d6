"""What a row says in each of the public layouts that are read, before any tokenizer sees it.

Layouts, by column names:
    prompts         context_messages [{role, content}]; or prompt, a string or a list of messages
    pairs           chosen and rejected [{role, content}], as in ultrafeedback_binarized; optional prompt_id,
                    and margin, or score_chosen and score_rejected (their difference is the margin)
    demonstrations  messages [{role, content}]; or chosen, as above; or prompt and response strings. The
                    last message is the target, everything before it is the prompt
    judgements      prompt, completion (strings or messages) and label (true or false); or pairs, as above
    texts           text, a string

Only the columns named here are looked at, and of those only what the layout takes.
"""

from collections.abc import Callable, Iterator

from rto_megatron.data.messages import Message
from rto_megatron.data.other_layouts import Examples, name_layout
from rto_megatron.data.rows import completed, conversation, first_column, label, prompt_messages, text
from rto_megatron.data.sources import Row
from rto_megatron.errors import DataError, UserError

TEXT_COLUMNS = (
    "system", "prompt", "context_messages", "messages", "chosen", "rejected", "response", "completion", "text",
)  # fmt: skip


def read_prompt(row: Row) -> list[Message]:
    """The conversation that waits for an answer."""
    return _named("prompts", _prompt, row)


def read_pair(row: Row) -> tuple[list[Message], list[Message]]:
    """The better and the worse conversation; they differ in their last message."""
    return _named("pairs", _pair, row)


def read_demonstration(row: Row) -> list[Message]:
    """The conversation whose last message is the target."""
    return _named("demonstrations", _demonstration, row)


def read_judgements(row: Row) -> list[tuple[list[Message], bool]]:
    """Conversations, each with the verdict on its last message."""
    return _named("judgements", _judgements, row)


def read_text(row: Row) -> str:
    """A text without roles."""
    return _named("texts", _text, row)


READERS: dict[Examples, Callable[[Row], object]] = {
    "prompts": read_prompt,
    "pairs": read_pair,
    "demonstrations": read_demonstration,
    "judgements": read_judgements,
    "texts": read_text,
}


def texts(row: Row) -> Iterator[str]:
    """Every text of a row in any of the layouts, for those who learn from text alone."""
    for column in TEXT_COLUMNS:
        value = row.columns.get(column)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            contents = (turn.get("content") for turn in value if isinstance(turn, dict))
            yield from (content for content in contents if isinstance(content, str))


def _named[T](wanted: Examples, read: Callable[[Row], T], row: Row) -> T:
    """What `read` says, or its error, which names the layout that the row is in where that is a known one."""
    try:
        return read(row)
    except UserError as error:
        named = name_layout(row, wanted, error)
        if named is error:
            raise
        raise named from error


def _prompt(row: Row) -> list[Message]:
    return prompt_messages(row, first_column(row, ("context_messages", "prompt"), "prompts"))


def _pair(row: Row) -> tuple[list[Message], list[Message]]:
    chosen = conversation(row, "chosen")
    rejected = conversation(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise DataError(
            f"{row.where}: chosen and rejected do not answer the same prompt; "
            "all messages but the last have to be equal"
        )
    return chosen, rejected


def _demonstration(row: Row) -> list[Message]:
    column = first_column(row, ("messages", "chosen", "response"), "demonstrations")
    if column == "response":
        return [*prompt_messages(row, "prompt"), Message("assistant", text(row, "response"))]
    return conversation(row, column)


def _judgements(row: Row) -> list[tuple[list[Message], bool]]:
    if "label" in row.columns:
        return [(completed(row), label(row))]
    first_column(row, ("chosen", "label"), "answers with verdicts")
    return [(conversation(row, "chosen"), True), (conversation(row, "rejected"), False)]


def _text(row: Row) -> str:
    return text(row, first_column(row, ("text",), "texts"))
