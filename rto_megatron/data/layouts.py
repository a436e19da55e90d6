"""The public layouts that are read, by what they hold; docs/data.md says what becomes of each.

Only the columns named here are looked at, and of those only what the layout takes.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from rto_megatron.data.foreign_rows import (
    alpaca_prompt,
    conversations_column,
    question,
    sharegpt,
    transcript,
)
from rto_megatron.data.messages import Message
from rto_megatron.data.reading import Cells, Examples, Reader, RowLayout
from rto_megatron.data.row import Row
from rto_megatron.data.rows import (
    answered,
    completed,
    conversation,
    first_column,
    is_transcript,
    label,
    prompt_messages,
    text,
)
from rto_megatron.errors import DataError

TEXT_COLUMNS = (
    "system", "instruction", "input", "question", "prompt", "context_messages", "messages", "conversations",
    "conversation", "chosen", "rejected", "response", "completion", "output", "text",
)  # fmt: skip

_ASKING = ("prompt", "question", "instruction")  # columns with what texts answer
_NO_COINCIDENCE = 4  # words; two answers may well begin with a shorter prompt

type _Conversation = list[Message]
type _Pair = tuple[_Conversation, _Conversation]
type _Judged = list[tuple[_Conversation, bool]]


def texts(row: Row) -> Iterator[str]:
    """Every text of a row in any of the layouts, for those who learn from text alone."""
    for column in TEXT_COLUMNS:
        value = row.columns.get(column)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            contents = (turn.get("content", turn.get("value")) for turn in value if isinstance(turn, dict))
            yield from (content for content in contents if isinstance(content, str))


def _has_turns(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _begins_with_answer(value: object) -> bool:
    return _has_turns(value) and isinstance(value, list) and value[0].get("role") == "assistant"


def _are_answers(cells: Cells) -> bool:
    """Two texts, neither of which is a whole transcript."""
    both = (cells.get("chosen"), cells.get("rejected"))
    return all(isinstance(said, str) for said in both) and not any(is_transcript(said) for said in both)


def _whole_pair(cells: Cells) -> bool:
    return _has_turns(cells.get("chosen")) and not _begins_with_answer(cells["chosen"])


def _trl_pair(cells: Cells) -> bool:
    return "prompt" in cells and _begins_with_answer(cells.get("chosen"))


def _text_pair(cells: Cells) -> bool:
    return "prompt" in cells and _are_answers(cells)


def _is_transcript_pair(cells: Cells) -> bool:
    return is_transcript(cells.get("chosen"))


def _alpaca_pair(cells: Cells) -> bool:
    return "instruction" in cells and _are_answers(cells)


def _question_pair(cells: Cells) -> bool:
    return "question" in cells and _are_answers(cells)


def _prompt_and(row: Row, column: str) -> _Conversation:
    return answered(row, prompt_messages(row, "prompt"), column)


def _instruction_and(row: Row, column: str) -> _Conversation:
    return answered(row, alpaca_prompt(row), column)


def _question_and(row: Row, column: str) -> _Conversation:
    return answered(row, question(row), column)


# Name, what it reads, whether a row has it, and the whole conversation with the answer of a column.
_PAIRS: tuple[tuple[str, str, Callable[[Cells], bool], Callable[[Row, str], _Conversation]], ...] = (
    ("conversations", "chosen + rejected (conversations)", _whole_pair, conversation),
    ("answers", "prompt + chosen + rejected (turns)", _trl_pair, _prompt_and),
    ("texts", "prompt + chosen + rejected (texts)", _text_pair, _prompt_and),
    ("transcripts", "chosen + rejected (Human: ... Assistant: ...)", _is_transcript_pair, transcript),
    ("instruction", "instruction + input + chosen + rejected", _alpaca_pair, _instruction_and),
    ("question", "question + chosen + rejected", _question_pair, _question_and),
)


def _alone(read: Callable[[Row, str], _Conversation], row: Row) -> _Conversation:
    return read(row, "chosen")


def _require_pair(row: Row) -> None:
    """Refuses what is no pair in any layout, of which an error of the first layout would blame the wrong column."""
    both = [row.columns.get(column) for column in ("chosen", "rejected")]
    found = sorted(row.columns)
    for column in ("chosen", "rejected"):
        if column not in row.columns:
            raise DataError(
                f"{row.where}: column {column!r} is missing, found {found}; expected chosen and rejected, texts or "
                "lists of messages: rename a column, or mend the row (a null is no column)"
            )
    if all(isinstance(said, str) for said in both) and not any(name in row.columns for name in _ASKING):
        raise DataError(
            f"{row.where}: chosen and rejected are texts, and of {found} no column says what they answer; expected a "
            f"list of messages that begins with the prompt, or one of {', '.join(_ASKING)} beside the texts"
        )


def _pair(read: Callable[[Row, str], _Conversation], row: Row) -> _Pair:
    if read is not transcript:  # which holds its prompt
        _require_pair(row)
    chosen, rejected = read(row, "chosen"), read(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise DataError(
            f"{row.where}: chosen and rejected do not answer the same prompt; "
            "all messages but the last have to be equal"
        )
    asked = chosen[-2].content.strip()
    if (
        isinstance(row.columns["chosen"], str)
        and len(asked.split()) >= _NO_COINCIDENCE
        and all(answer[-1].content.lstrip().startswith(asked) for answer in (chosen, rejected))
    ):
        raise DataError(
            f"{row.where}: chosen and rejected both begin with the prompt, {asked!r:.60}, which would be trained as a "
            "part of the answer; remove it from both"
        )
    return chosen, rejected


def _both(read: Callable[[Row, str], _Conversation], row: Row) -> _Judged:
    chosen, rejected = _pair(read, row)
    return [(chosen, True), (rejected, False)]


def _judged(row: Row) -> _Judged:
    first_column(row, ("chosen", "label"), "answers with verdicts")
    if "label" not in row.columns:
        _require_pair(row)
    return [(completed(row), label(row))]


def _demonstrated(row: Row) -> _Conversation:
    first_column(row, _DEMONSTRATED, "demonstrations")
    if "messages" not in row.columns:
        whole = "; ".join(layout.columns for layout in DEMONSTRATIONS.layouts if not layout.is_last_resort)
        raise DataError(
            f"{row.where}: found the columns {sorted(row.columns)}, which are no whole layout of demonstrations; "
            f"expected one of: {whole}; or a whole pair. Rename a column, or mend the row (a null is no column)"
        )
    return conversation(row, "messages")


_DEMONSTRATED = ("messages", "conversations", "chosen", "response", "completion", "output")


PROMPTS = Reader(
    "prompts",
    (
        RowLayout(
            "prompt",
            "prompt",
            lambda cells: "context_messages" not in cells and "prompt" in cells,
            lambda row: prompt_messages(row, first_column(row, ("context_messages", "prompt"), "prompts")),
        ),
        RowLayout(
            "context_messages",
            "context_messages",
            lambda cells: "context_messages" in cells,
            lambda row: prompt_messages(row, "context_messages"),
        ),
    ),
)
PAIRS = Reader(
    "pairs",
    tuple(RowLayout(name, columns, has, partial(_pair, read)) for name, columns, has, read in _PAIRS),
)
DEMONSTRATIONS = Reader(
    "demonstrations",
    (
        RowLayout("messages", "messages", lambda cells: "messages" in cells, _demonstrated),
        RowLayout(
            "response",
            "prompt + response",
            lambda cells: "response" in cells,
            lambda row: answered(row, prompt_messages(row, "prompt"), "response"),
        ),
        RowLayout(
            "completion",
            "prompt + completion",
            lambda cells: "completion" in cells,
            completed,
        ),
        RowLayout(
            "alpaca",
            "instruction + input + output",
            lambda cells: {"instruction", "output"} <= cells.keys(),
            lambda row: answered(row, alpaca_prompt(row), "output"),
        ),
        RowLayout(
            "sharegpt",
            "conversations",
            lambda cells: _has_turns(cells.get(conversations_column(cells))),
            sharegpt,
        ),
        *(
            RowLayout(
                name, f"the chosen answer of {columns}", has, partial(_alone, read), is_last_resort=True
            )
            for name, columns, has, read in _PAIRS
        ),
    ),
)
JUDGEMENTS = Reader(
    "judgements",
    (
        RowLayout("label", "prompt + completion + label", lambda cells: "label" in cells, _judged),
        *(
            RowLayout(name, columns, has, partial(_both, read), is_last_resort=True)
            for name, columns, has, read in _PAIRS
        ),
    ),
)
TEXTS = Reader(
    "texts",
    (
        RowLayout(
            "text",
            "text",
            lambda cells: "text" in cells,
            lambda row: text(row, first_column(row, ("text",), "texts")),
        ),
    ),
)
READERS: Mapping[Examples, Reader[object]] = {
    "prompts": PROMPTS,
    "pairs": PAIRS,
    "demonstrations": DEMONSTRATIONS,
    "judgements": JUDGEMENTS,
    "texts": TEXTS,
}
