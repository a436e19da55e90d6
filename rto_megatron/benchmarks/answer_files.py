"""The answers of one model to a benchmark: the files that its judges read, written and read.

AlpacaEval: model_outputs.json, a list of {instruction, output, generator}. Arena-Hard: model_answer/<model>.jsonl, one
a line: of v0.1 {question_id, model_id, choices, conv_metadata}, of v2.0 {uid, model, messages, metadata}.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rto_megatron.benchmarks.markdown_counts import markdown_counts
from rto_megatron.benchmarks.questions import Benchmark, Question, text_of
from rto_megatron.benchmarks.token_counts import CountTokens
from rto_megatron.data.row import Row
from rto_megatron.data.sources import read_rows
from rto_megatron.errors import DataError, refuse_if
from rto_megatron.platform.whole_files import write_whole

_ANSWER_COLUMNS: tuple[tuple[Benchmark, set[str]], ...] = (
    ("alpaca_eval", {"instruction", "output"}),
    ("arena_hard_v0.1", {"question_id", "model_id", "choices"}),
    ("arena_hard_v2.0", {"uid", "model", "messages"}),
)


@dataclass(frozen=True)
class BenchmarkAnswer:
    """One answer.

    Example:
        BenchmarkAnswer(key="q1", text="Four.", model="rto", question="What is 2 + 2?")
    """

    key: str  # as in `Question`
    text: str
    model: str
    question: str | None = None  # None: the file does not say, as those of Arena-Hard v0.1
    style: Mapping[str, object] | None = field(default=None, hash=False)  # token_len and counts of markdown


@dataclass(frozen=True)
class Answers:
    """The answers of one model, by the key of their question, in the order of the file.

    Example:
        answers.by_key["q1"].text
    """

    benchmark: Benchmark
    model: str
    path: Path
    by_key: Mapping[str, BenchmarkAnswer]


def read_answers(path: Path) -> Answers:
    """Reads the answers of one model; which benchmark they are of is told by the columns.

    Raises:
        DataError: the file cannot be read, is of none, holds several models, or answers a question twice.
    """
    rows = list(read_rows(str(path)))
    if not rows:
        raise DataError(f"{path}: there is no answer in it; generate it again")
    benchmark = _benchmark_of(rows[0])
    answers, problems = [], []
    for row in rows:
        try:
            answers.append(_read(benchmark, row))
        except DataError as error:
            problems.append(str(error))
    often = [key for key, count in Counter(one.key for one in answers).items() if count > 1]
    problems += [f"{path}: {key!r:.80} is answered more than once" for key in often]
    models = sorted({one.model for one in answers})
    if len(models) > 1:
        problems.append(f"{path}: holds the models {', '.join(models)}; keep those of one")
    refuse_if(problems, f"{path} holds answers to {benchmark} that cannot be used", DataError)
    return Answers(benchmark, models[0], path, {one.key: one for one in answers})


def _benchmark_of(row: Row) -> Benchmark:
    for benchmark, columns in _ANSWER_COLUMNS:
        if columns <= row.columns.keys():
            return benchmark
    raise DataError(
        f"{row.where}: found the columns {sorted(row.columns)}; expected instruction and output (AlpacaEval), "
        "question_id, model_id and choices (Arena-Hard v0.1), or uid, model and messages (Arena-Hard v2.0)"
    )


def _read(benchmark: Benchmark, row: Row) -> BenchmarkAnswer:
    columns = row.columns
    try:
        if benchmark == "alpaca_eval":
            instruction = text_of(row, columns["instruction"], "instruction")
            return BenchmarkAnswer(
                instruction, _said(columns["output"]), str(columns.get("generator", "unnamed")), instruction
            )
        if benchmark == "arena_hard_v0.1":
            text = _said(columns["choices"][0]["turns"][0]["content"])  # type: ignore[index]  # checked by the except
            style = columns.get("conv_metadata")
            return BenchmarkAnswer(
                str(columns["question_id"]), text, str(columns["model_id"]), None, _mapping(style)
            )
        # Of some models a system prompt stands before them.
        asked, answered = columns["messages"][-2:]  # type: ignore[index]  # checked by the except
        said = answered["content"]
        text = _said(said["answer"] if isinstance(said, dict) else said)
        style = columns.get("metadata")
        return BenchmarkAnswer(
            str(columns["uid"]), text, str(columns["model"]), _said(asked["content"]), _mapping(style)
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"{row.where}: is no answer of {benchmark} ({type(error).__name__}: {error})"
        ) from error


def _said(value: object) -> str:
    """An answer; an empty one is one too."""
    if isinstance(value, str):
        return value
    raise TypeError(f"found {value!r:.60} in place of text")


def _mapping(value: object) -> Mapping[str, object] | None:
    return value if isinstance(value, dict) else None


def write_answers(
    benchmark: Benchmark,
    model: str,
    answered: Sequence[tuple[Question, str]],
    folder: Path,
    count_tokens: CountTokens | None,
) -> Path:
    """Writes the files of a benchmark, whole or not at all, and returns the path.

    Args:
        model: the name under which the answers are judged.
        answered: questions with their answers.
        folder: receives model_outputs.json or model_answer/<model>.jsonl.
        count_tokens: for Arena-Hard's style control; AlpacaEval needs none.
    """
    if benchmark == "alpaca_eval":
        path = folder / "model_outputs.json"
        rows = [
            {**_kept(question), "instruction": question.text, "output": text, "generator": model}
            for question, text in answered
        ]
        content = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    else:
        assert count_tokens is not None, "style control counts tokens"
        path = folder / "model_answer" / f"{model}.jsonl"
        write = _arena_hard_01 if benchmark == "arena_hard_v0.1" else _arena_hard_20
        lines = [
            json.dumps(write(question, text, model, count_tokens), ensure_ascii=False)
            for question, text in answered
        ]
        content = "\n".join(lines) + "\n"
    write_whole(path, content)
    return path


def _kept(question: Question) -> dict[str, object]:
    """What AlpacaEval's own files say beside instruction and output."""
    return {name: question.columns[name] for name in ("dataset", "datasplit") if name in question.columns}


def _arena_hard_01(question: Question, text: str, model: str, count_tokens: CountTokens) -> dict[str, object]:
    return {
        "question_id": question.key,
        "answer_id": _answer_id(question, model),
        "model_id": model,
        "choices": [{"index": 0, "turns": [{"content": text}]}],
        "tstamp": time.time(),
        "conv_metadata": style_of(text, count_tokens),
    }


def _arena_hard_20(question: Question, text: str, model: str, count_tokens: CountTokens) -> dict[str, object]:
    messages = [
        {"role": "user", "content": question.text},
        {"role": "assistant", "content": {"answer": text}},
    ]
    return {
        "uid": question.key,
        "ans_id": _answer_id(question, model),
        "model": model,
        "messages": messages,
        "tstamp": time.time(),
        "metadata": style_of(text, count_tokens),
    }


def style_of(text: str, count_tokens: CountTokens) -> dict[str, object]:
    """What style control reads of an answer: token_len, and the counts of markdown."""
    return {"token_len": count_tokens(text), **markdown_counts(text)}


def _answer_id(question: Question, model: str) -> str:
    return hashlib.sha256(f"{model}/{question.key}".encode()).hexdigest()[:22]
