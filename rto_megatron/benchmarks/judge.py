"""The answers of a model and of a baseline become the judgments of a benchmark, in the benchmark's own files.

The folder holds judge_replies.jsonl, to which every reply is added when it is there; a judging that was stopped goes on
from it, and what was answered is never asked again. AlpacaEval's annotations.json and Arena-Hard's
model_judgment/<judge>/<model>.jsonl are written when all is judged.
"""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from rto_megatron.benchmarks.answer_files import Answers, read_answers
from rto_megatron.benchmarks.arena_judgments import Version
from rto_megatron.benchmarks.asked_judge import AskedJudge, TokenUse
from rto_megatron.benchmarks.chat_endpoint import ChatClient, Endpoint
from rto_megatron.benchmarks.journal import Journal
from rto_megatron.benchmarks.judge_templates import JudgeTemplate
from rto_megatron.benchmarks.judging import (
    Comparison,
    JudgedComparison,
    JudgeOptions,
    LabelJudge,
    PairwiseJudge,
    judge_all,
    shows_model_first,
    unjudged_reasons,
)
from rto_megatron.benchmarks.questions import Questions, read_questions
from rto_megatron.errors import DataError, RecipeError, refuse_if
from rto_megatron.platform.whole_files import write_whole
from rto_megatron.reporting.progress import Advance

REPLIES = "judge_replies.jsonl"
_SHOWN = 3

# (number of comparisons, known ones) -> what to call for every other one.
type Bar = Callable[[int, int], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class JudgeTask:
    """What is to be judged.

    Args:
        questions: Arena-Hard's; None for AlpacaEval, whose answers hold their instructions.
        category: of Arena-Hard v2.0; None: all.

    Example:
        JudgeTask(answers, baseline, questions=None, category=None)
    """

    answers: Answers
    baseline: Answers
    questions: Questions | None
    category: str | None


@dataclass(frozen=True)
class JudgeOutcome:
    """What came out.

    Example:
        print(outcome.path, outcome.use)
    """

    path: Path
    num_comparisons: int
    num_unjudged: int  # comparisons without a verdict
    unjudged: dict[str, str]  # question -> what the judge said in place of a verdict
    use: TokenUse  # of this command
    use_before: TokenUse


def read_task(answers: Path, baseline: Path, questions: Path | None, category: str | None) -> JudgeTask:
    """Reads all files, and compares what they answer.

    Raises:
        DataError: they are of different benchmarks, answer different questions, or are of two models with one name.
        RecipeError: the questions of Arena-Hard are not named, or a category is where there is none.
    """
    own, other = read_answers(answers), read_answers(baseline)
    if own.benchmark != other.benchmark:
        raise DataError(
            f"{answers} answers {own.benchmark} and {baseline} {other.benchmark}; name two of one benchmark"
        )
    _require_names(own, other)
    if own.benchmark == "alpaca_eval":
        if questions is not None or category is not None:
            raise RecipeError(
                "--questions and --category are Arena-Hard's; AlpacaEval's files hold their instructions"
            )
        _require_equal(own, other)
        return JudgeTask(own, other, None, None)
    if questions is None:
        raise RecipeError(f"{own.benchmark} needs --questions, its question.jsonl")
    asked = read_questions(questions)
    if asked.benchmark != own.benchmark:
        raise DataError(
            f"{questions} has questions of {asked.benchmark}, and {answers} answers {own.benchmark}"
        )
    if category is not None:
        kept = tuple(one for one in asked.items if one.columns.get("category") == category)
        known = sorted({str(one.columns.get("category")) for one in asked.items})
        if not kept:
            raise RecipeError(f"--category {category}: {questions} has {', '.join(known)}")
        asked = Questions(asked.benchmark, kept)
    _require_answered(asked, (own, other))
    return JudgeTask(own, other, asked, category)


def _require_names(own: Answers, other: Answers) -> None:
    """Scores find a model by its name, and take one that is called as the baseline for the baseline."""
    both = own.by_key.keys() & other.by_key.keys()
    if own.model == other.model and any(own.by_key[key].text != other.by_key[key].text for key in both):
        raise DataError(
            f"{own.path} and {other.path} answer differently, and both are of a model called {own.model!r}; give one "
            "of them another name (generator, model_id or model in each of its rows)"
        )


def _require_equal(own: Answers, other: Answers) -> None:
    """AlpacaEval finds a row by its instruction, to the byte."""
    problems = []
    for one, two in ((own, other), (other, own)):
        missing = [key for key in two.by_key if key not in one.by_key]
        alike = {" ".join(key.split()) for key in one.by_key}
        near = sum(" ".join(key.split()) in alike for key in missing)
        if missing:
            shown = ", ".join(f"{key!r:.60}" for key in missing[:_SHOWN])
            hint = f"; {near} of them differ in white space alone" if near else ""
            problems.append(
                f"{one.path} does not answer {len(missing)} instructions of {two.path}: {shown}{hint}"
            )
    refuse_if(problems, "both files must answer the same instructions, equal to the byte", DataError)


def _require_answered(asked: Questions, files: Sequence[Answers]) -> None:
    problems = []
    for answers in files:
        missing = [key for key in asked.keys if key not in answers.by_key]
        differs = [
            one.key
            for one in asked.items
            if one.key in answers.by_key and answers.by_key[one.key].question not in (None, one.text)
        ]
        if missing:
            problems.append(
                f"{answers.path} does not answer {len(missing)} questions: {', '.join(missing[:_SHOWN])}"
            )
        if differs:
            problems.append(
                f"{answers.path} answers {len(differs)} questions of another text: {', '.join(differs[:_SHOWN])}"
            )
    refuse_if(problems, "the answers do not fit the questions", DataError)


def judge(
    task: JudgeTask,
    endpoint: Endpoint,
    template: JudgeTemplate,
    options: JudgeOptions,
    folder: Path,
    judges_again: bool,
    bar: Bar,
) -> JudgeOutcome:
    """Judges everything and writes the benchmark's file.

    Args:
        folder: exists; receives replies and judgments.
        judges_again: ask once more where an earlier command got no verdict.

    Raises:
        JudgeError: the endpoint cannot be used; every reply so far is in the folder.
    """
    comparisons = _comparisons(task)
    judge_of_benchmark: PairwiseJudge | LabelJudge
    if task.questions is None:
        judge_of_benchmark = PairwiseJudge(template, options)
    else:
        judge_of_benchmark = LabelJudge(template, options, _version(task))
    with Journal(folder / REPLIES) as journal:

        async def run() -> tuple[list[JudgedComparison], AskedJudge]:
            async with ChatClient(endpoint) as client:
                asked = AskedJudge(client, journal)
                known = sum(asked.knows(judge_of_benchmark.first_request(one)) for one in comparisons)
                with bar(len(comparisons), known) as advance:
                    judged = await judge_all(
                        comparisons, judge_of_benchmark, asked, endpoint.concurrency, judges_again, advance
                    )
                return judged, asked

        judged, asked = asyncio.run(run())
    write = _write_alpaca_eval if task.questions is None else _write_arena_hard
    path = write(task, judged, template, options, folder)
    lost = sum(one.verdict is None for one in judged)
    reasons = dict(unjudged_reasons(judged))
    return JudgeOutcome(path, len(comparisons), lost, reasons, asked.use, asked.use_before)


def _version(task: JudgeTask) -> Version:
    return "v0.1" if task.answers.benchmark == "arena_hard_v0.1" else "v2.0"


def _comparisons(task: JudgeTask) -> list[Comparison]:
    own, other = task.answers.by_key, task.baseline.by_key
    if task.questions is None:
        # In the baseline's order, as difficulties of instructions go by it.
        return [
            _comparison(key, key, other[key].text, own[key].text, shows_model_first(key)) for key in other
        ]
    return [
        _comparison(
            question.key, question.text, other[question.key].text, own[question.key].text, is_model_first
        )
        for question in task.questions.items
        for is_model_first in (False, True)
    ]


def _comparison(key: str, question: str, baseline: str, model: str, is_model_first: bool) -> Comparison:
    first, second = (model, baseline) if is_model_first else (baseline, model)
    return Comparison(key, question, first, second, is_model_first)


def _write_alpaca_eval(
    task: JudgeTask,
    judged: Sequence[JudgedComparison],
    template: JudgeTemplate,
    options: JudgeOptions,
    folder: Path,
) -> Path:
    rows = [
        {
            "instruction": one.comparison.key,
            "output_1": task.baseline.by_key[one.comparison.key].text,
            "generator_1": task.baseline.model,
            "output_2": task.answers.by_key[one.comparison.key].text,
            "generator_2": task.answers.model,
            "annotator": f"{options.model} ({template.source})",
            "preference": one.verdict,
            "raw_completion": one.raw,
        }
        for one in judged
    ]
    path = folder / "annotations.json"
    write_whole(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    return path


def _write_arena_hard(
    task: JudgeTask,
    judged: Sequence[JudgedComparison],
    template: JudgeTemplate,
    options: JudgeOptions,
    folder: Path,
) -> Path:
    assert task.questions is not None
    write = _row_01 if _version(task) == "v0.1" else _row_20
    judge_name = re.sub(r"[^\w.-]+", "_", options.model)
    path = folder / "model_judgment" / judge_name / f"{task.answers.model}.jsonl"
    lines = _of_other_questions(path, task)
    for place, question in enumerate(task.questions.items):
        games = judged[2 * place : 2 * place + 2]
        common = {
            "model": task.answers.model,
            "judge": options.model,
            "baseline": task.baseline.model,
            "template": template.source,
        }
        row = write(question.key, str(question.columns.get("category", "")), common, games)
        lines.append(json.dumps(row, ensure_ascii=False))
    write_whole(path, "\n".join(lines) + "\n")
    return path


def _of_other_questions(path: Path, task: JudgeTask) -> list[str]:
    """Lines of categories judged before: each of v2.0 has a baseline, and so a command, of its own."""
    assert task.questions is not None
    if task.category is None or not path.exists():
        return []
    key, asked = "question_id" if _version(task) == "v0.1" else "uid", set(task.questions.keys)
    # By "\n" alone: what a judge said may hold other ends of lines, as U+2028.
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [line for line in lines if json.loads(line)[key] not in asked]


def _row_01(
    key: str, category: str, common: dict[str, str], games: Sequence[JudgedComparison]
) -> dict[str, object]:
    return {
        "question_id": key,
        **common,
        "games": [
            {"user_prompt": game.prompt[-1]["content"], "judgment": game.said, "score": game.verdict}
            for game in games
        ],
    }


def _row_20(
    key: str, category: str, common: dict[str, str], games: Sequence[JudgedComparison]
) -> dict[str, object]:
    return {
        "uid": key,
        "category": category,
        **common,
        "games": [
            {"score": game.verdict, "judgment": {"answer": game.said}, "prompt": list(game.prompt)}
            for game in games
        ],
    }
