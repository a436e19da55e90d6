"""The questions of a benchmark, from the files that AlpacaEval and Arena-Hard publish.

Layouts, by columns:
    alpaca_eval       a list of {instruction, ...}: the evaluation set, or any model_outputs.json
    arena_hard_v0.1   a line each, {question_id, turns: [{content}], ...}
    arena_hard_v2.0   a line each, {uid, prompt, category, ...}
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rto_megatron.data.row import Row
from rto_megatron.data.sources import read_rows
from rto_megatron.errors import DataError, refuse_if

Benchmark = Literal["alpaca_eval", "arena_hard_v0.1", "arena_hard_v2.0"]


@dataclass(frozen=True)
class Question:
    """One question; answers and verdicts are found again by `key`.

    Example:
        Question(key="q1", text="What is 2 + 2?", where="question.jsonl:1")
    """

    key: str  # AlpacaEval: the instruction itself; Arena-Hard: question_id or uid
    text: str  # as it is asked, to the byte
    where: str  # its row, for messages
    columns: Mapping[str, object] = field(default_factory=dict, hash=False)  # of its row


@dataclass(frozen=True)
class Questions:
    """All questions of a file, in its order.

    Example:
        Questions("alpaca_eval", (Question("2 + 2?", "2 + 2?", "alpaca_eval.json row 1"),)).keys
    """

    benchmark: Benchmark
    items: tuple[Question, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Of all questions, in order."""
        return tuple(one.key for one in self.items)


def read_questions(path: Path) -> Questions:
    """Reads a file of questions; which benchmark it is of is told by its columns.

    Raises:
        DataError: it cannot be read, is of none of them, has a question twice, or one without text.
    """
    rows = list(read_rows(str(path)))
    if not rows:
        raise DataError(f"{path}: there is no question in it; fetch the file again")
    benchmark = benchmark_of(rows[0])
    items, problems = [], []
    for row in rows:
        try:
            items.append(_READERS[benchmark](row))
        except DataError as error:
            problems.append(str(error))
    often = [key for key, count in Counter(item.key for item in items).items() if count > 1]
    problems += [f"{path}: {key!r:.80} is there more than once" for key in often]
    refuse_if(problems, f"{path} holds questions of {benchmark} that cannot be asked", DataError)
    return Questions(benchmark, tuple(items))


def benchmark_of(row: Row) -> Benchmark:
    """Which benchmark's layout a row has.

    Raises:
        DataError: none's.
    """
    layouts: tuple[tuple[Benchmark, set[str]], ...] = (
        ("alpaca_eval", {"instruction"}),
        ("arena_hard_v0.1", {"question_id", "turns"}),
        ("arena_hard_v2.0", {"uid", "prompt"}),
    )
    for benchmark, columns in layouts:
        if columns <= row.columns.keys():
            return benchmark
    raise DataError(
        f"{row.where}: found the columns {sorted(row.columns)}; expected instruction (AlpacaEval), question_id and "
        "turns (Arena-Hard v0.1), or uid and prompt (Arena-Hard v2.0)"
    )


def _alpaca_eval(row: Row) -> Question:
    text = text_of(row, row.columns.get("instruction"), "instruction")
    return Question(text, text, row.where, row.columns)


def _arena_hard_01(row: Row) -> Question:
    turns = row.columns.get("turns")
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
        raise DataError(f"{row.where}: turns is {turns!r:.60}, expected a list of one {{'content': text}}")
    text = text_of(row, turns[0].get("content"), "turns[0].content")
    return Question(text_of(row, row.columns.get("question_id"), "question_id"), text, row.where, row.columns)


def _arena_hard_20(row: Row) -> Question:
    text = text_of(row, row.columns.get("prompt"), "prompt")
    return Question(text_of(row, row.columns.get("uid"), "uid"), text, row.where, row.columns)


_READERS: dict[Benchmark, Callable[[Row], Question]] = {
    "alpaca_eval": _alpaca_eval,
    "arena_hard_v0.1": _arena_hard_01,
    "arena_hard_v2.0": _arena_hard_20,
}


def text_of(row: Row, value: object, column: str) -> str:
    """A text of a row that must not be empty.

    Raises:
        DataError: it is none.
    """
    if isinstance(value, str) and value.strip():
        return value
    raise DataError(f"{row.where}: {column} is {value!r:.60}, expected text that is not empty")
