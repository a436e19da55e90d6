"""Arena-Hard's verdicts, as its model_judgment/*.jsonl hold them, and the battles that they make.

Sources: show_result.py of both versions. Every question is judged twice, the answers in both orders: in game 0 the
baseline is A, in game 1 the model is. A strong verdict counts as three battles.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from rto_megatron.benchmarks.questions import text_of
from rto_megatron.data.row import Row
from rto_megatron.data.sources import read_rows
from rto_megatron.errors import DataError, refuse_if

Version = Literal["v0.1", "v2.0"]
STRONG = 3  # battles of a strong verdict
# Whom models meet, where a file does not name it, as those of v0.1.
_OLD_BASELINE = "gpt-4-0314"
_BASELINES = {
    "hard_prompt": "o3-mini-2025-01-31",
    "coding": "o3-mini-2025-01-31",
    "math": "o3-mini-2025-01-31",
    "creative_writing": "gemini-2.0-flash-001",
    "arena-hard-v0.1": _OLD_BASELINE,
}
LABELS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")
# Only v2.0's own reader takes these.
_MIRRORED = {"A<<B": "B>>A", "A<B": "B>A", "B=A": "A=B", "B<A": "A>B", "B<<A": "A>>B"}
_WINS_OF_B = {"A>>B": 0.0, "A>B": 0.0, "A=B": 0.5, "B>A": 1.0, "B>>A": 1.0}


@dataclass(frozen=True)
class Judged:
    """The verdicts on one question; None: the judge gave none in that game.

    Example:
        Judged(question="q1", category="arena-hard-v0.1", baseline="gpt-4-0314", labels=("A>B", None))
    """

    question: str
    category: str
    baseline: str
    labels: tuple[str | None, str | None]


@dataclass(frozen=True)
class Judgments:
    """All verdicts of one judge on one model.

    Example:
        judgments.model, judgments.judged[0].labels
    """

    version: Version
    path: Path
    model: str
    judge: str
    judged: tuple[Judged, ...]

    @property
    def baseline(self) -> str:
        """Whom the model met; of v2.0 in each category another one."""
        return " and ".join(sorted({one.baseline for one in self.judged}))

    @property
    def num_unjudged(self) -> int:
        """Games without a verdict."""
        return sum(label is None for one in self.judged for label in one.labels)


@dataclass(frozen=True)
class Battles:
    """The battles of one model against the baseline, float64 and in the order of the questions.

    Example:
        fought.wins.mean()
    """

    questions: tuple[str, ...]  # of each battle
    wins: np.ndarray  # of the model: 1, 0.5 or 0


def read_judgments(path: Path, baseline: str | None = None) -> Judgments:
    """Reads the verdicts on one model.

    Args:
        baseline: what the model was judged against, where the file does not say; None: the official one.

    Raises:
        DataError: the file cannot be read, is of none or several models, or judges a question twice.
    """
    rows = list(read_rows(str(path)))
    if not rows:
        raise DataError(f"{path}: there is no verdict in it; judge the answers again")
    version: Version = "v0.1" if "question_id" in rows[0].columns else "v2.0"
    judged, problems = [], []
    for row in rows:
        try:
            judged.append(_judged(row, version, baseline))
        except DataError as error:
            problems.append(str(error))
    often = [key for key, count in Counter(one.question for one in judged).items() if count > 1]
    problems += [f"{path}: {key!r:.80} is judged more than once" for key in often]
    named = {
        column: sorted({str(row.columns[column]) for row in rows if column in row.columns})
        for column in ("model", "judge")
    }
    models, judges = named["model"], named["judge"]
    if len(models) != 1 or len(judges) > 1:
        problems.append(f"{path}: models {models} of judges {judges}; expected one of each")
    refuse_if(problems, f"{path} cannot be scored", DataError)
    return Judgments(version, path, models[0], "".join(judges) or "unnamed", tuple(judged))


def _judged(row: Row, version: Version, baseline: str | None) -> Judged:
    games = row.columns.get("games")
    key = text_of(row, row.columns.get("question_id" if version == "v0.1" else "uid"), "question_id or uid")
    if not isinstance(games, list) or len(games) != 2:
        raise DataError(f"{row.where}: games is {games!r:.60}, expected a list of two")
    first, second = (_label(row, game, version) for game in games)
    category = str(row.columns.get("category", f"arena-hard-{version}"))
    official = _OLD_BASELINE if version == "v0.1" else _BASELINES.get(category, "unnamed")
    against = str(row.columns.get("baseline", baseline or official))
    return Judged(key, category, against, (first, second))


def _label(row: Row, game: object, version: Version) -> str | None:
    if game is None:
        return None
    if not isinstance(game, dict):
        raise DataError(f"{row.where}: a game is {game!r:.60}, expected an object with a score")
    score = game.get("score")
    if version == "v2.0" and isinstance(score, str):
        score = _MIRRORED.get(score, score)
    return score if score in LABELS else None


def battles(judgments: Judgments) -> Battles:
    """What the verdicts count: of v0.1 each game by itself, of v2.0 only questions with both verdicts."""
    questions: list[str] = []
    wins: list[float] = []
    for one in judgments.judged:
        if judgments.version == "v2.0" and None in one.labels:
            continue
        for game, label in enumerate(one.labels):
            if label is None:
                continue
            won = _WINS_OF_B[label] if game == 0 else 1 - _WINS_OF_B[label]
            count = STRONG if ">>" in label else 1
            questions += [one.question] * count
            wins += [won] * count
    return Battles(tuple(questions), np.array(wins, dtype=np.float64))


def by_category(judgments: Judgments) -> dict[str, Judgments]:
    """The verdicts of each category alone; v2.0 is scored so, as each has a baseline of its own."""
    categories = list(dict.fromkeys(one.category for one in judgments.judged))
    return {
        category: replace(
            judgments, judged=tuple(one for one in judgments.judged if one.category == category)
        )
        for category in categories
    }


_VERDICT = re.compile(r"\[\[([AB<>=]+)\]\]")
_LOOSE_VERDICT = re.compile(r"\[([AB<>=]+)\]")


def label_of(judgment: str, version: Version) -> tuple[str | None, bool]:
    """The verdict in a judge's words, and whether to ask once more.

    Of v0.1 a text with two different verdicts has none, and one without any is asked to go on. Of v2.0 the last counts,
    in small letters too. What no label says, such as [[A]], is no verdict.
    """
    if version == "v2.0":
        said = judgment.upper()
        found = _VERDICT.findall(said) or _LOOSE_VERDICT.findall(said)
        return (found[-1] if found and found[-1] in (*LABELS, *_MIRRORED) else None), False
    found = _VERDICT.findall(judgment)
    if not found:
        return None, True
    return (found[0] if len(set(found)) == 1 and found[0] in LABELS else None), False
