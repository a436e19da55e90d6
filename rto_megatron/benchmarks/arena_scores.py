"""Arena-Hard's win rates with intervals, and the win rate at equal style, of a pool of models.

Source: show_result.py and utils_math.py of v0.1. The plain rate is the Bradley-Terry model's: as every model meets the
baseline alone, its maximum is (wins + ties / 2) / battles, whatever else is in the pool. At equal style it is not:
coefficients of style and their scales are the whole pool's, so that a rate has no meaning without naming the pool.
Formulas agree with tests/golden/eval.json; style control was never run on the official verdicts.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from rto_megatron.benchmarks.answer_files import Answers
from rto_megatron.benchmarks.arena_judgments import Battles, Judgments, battles
from rto_megatron.benchmarks.win_rates import bootstrap_interval, standard_error
from rto_megatron.errors import DataError, refuse_if

STYLES = ("token_len", "header_count", "list_count", "bold_count")
_LOG_BASE = math.log(10)  # the scale of Elo's ratings, on which the penalty depends


@dataclass(frozen=True)
class Interval:
    """A rate in percent, and where its bootstrap lies.

    Example:
        Interval(rate=21.4, low=19.6, high=23.3)
    """

    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class ArenaScore:
    """The numbers of one model.

    Example:
        ArenaScore("rto", Interval(21.4, 19.6, 23.3), 1.1, num_battles=1210, num_unjudged=2)
    """

    model: str
    win_rate: Interval
    standard_error: float  # over questions, whose battles are not independent; percent
    num_battles: int
    num_unjudged: int  # games
    styled: Interval | None = None  # at equal style; None: not asked for


def score(judgments: Judgments, num_rounds: int, seed: int) -> ArenaScore:
    """The plain rate of one model.

    The interval is the official one: battles are drawn again, each by itself; of v0.1 95 % of 100 rounds, of v2.0 90 %.

    Raises:
        DataError: there is no verdict.
    """
    fought = battles(judgments)
    if not len(fought.wins):
        raise DataError(f"{judgments.path}: no game has a verdict; look at the judge's answers in it")
    percent = 95 if judgments.version == "v0.1" else 90
    low, high = bootstrap_interval(fought.wins, num_rounds, seed, percent)
    return ArenaScore(
        judgments.model,
        Interval(100 * float(fought.wins.mean()), 100 * low, 100 * high),
        100 * _clustered_error(fought),
        len(fought.wins),
        judgments.num_unjudged,
    )


def _clustered_error(fought: Battles) -> float:
    """Of the mean over battles, where those of a question belong together."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for question, won in zip(fought.questions, fought.wins.tolist(), strict=True):
        sums[question][0] += won
        sums[question][1] += 1
    totals = np.array(list(sums.values()))
    mean = totals[:, 0].sum() / totals[:, 1].sum()
    # The ratio estimator: residuals of the questions' sums, over the mean number of battles.
    return standard_error((totals[:, 0] - mean * totals[:, 1]) / totals[:, 1].mean())


@dataclass(frozen=True)
class StyledBattles:
    """The battles of a pool with what tells the styles of both answers apart.

    Example:
        StyledBattles(("rto",), np.array([0]), np.array([1.0]), np.array([[0.2, 0.0, 0.1, 0.0]]))
    """

    models: tuple[str, ...]
    model_of: np.ndarray  # [battles], index into `models`
    wins: np.ndarray  # [battles], of the model
    styles: np.ndarray  # [battles, 4], (baseline - model) / (baseline + model + 1)


def styled_battles(pool: Sequence[Judgments], answers: Mapping[str, Answers]) -> StyledBattles:
    """Joins verdicts and the styles of answers.

    Args:
        pool: one for each model, of v0.1 and against one baseline.
        answers: by model, the baseline's among them.

    Raises:
        DataError: names every model and question without counts, and verdicts that cannot be joined.
    """
    problems = [
        f"{one.path}: style control is of Arena-Hard v0.1, this is {one.version}"
        for one in pool
        if one.version != "v0.1"
    ]
    baselines = sorted({one.baseline for one in pool})
    if len(baselines) > 1:
        problems.append(f"the pool was judged against {', '.join(baselines)}; expected one baseline")
    wanted = [*baselines, *(one.model for one in pool)]
    problems += [f"no answers of {name} in the folder of answers" for name in wanted if name not in answers]
    refuse_if(problems, "style control is not possible", DataError)
    model_of, wins, styles = [], [], []
    for number, judgments in enumerate(pool):
        fought = battles(judgments)
        for question, won in zip(fought.questions, fought.wins.tolist(), strict=True):
            try:
                a, b = (_style(answers[name], question) for name in (baselines[0], judgments.model))
            except DataError as error:
                problems.append(str(error))
                continue
            model_of.append(number)
            wins.append(won)
            styles.append((a - b) / (a + b + 1))
    refuse_if(list(dict.fromkeys(problems)), "style control is not possible", DataError)
    return StyledBattles(
        tuple(one.model for one in pool),
        np.array(model_of),
        np.array(wins),
        np.array(styles, dtype=np.float64),
    )


def _style(answers: Answers, question: str) -> np.ndarray:
    answer = answers.by_key.get(question)
    if answer is None:
        raise DataError(f"{answers.path}: question {question} is judged and not answered")
    if answer.style is None or not set(STYLES) <= answer.style.keys():
        raise DataError(
            f"{answers.path}: answers have no counts of style (conv_metadata); add them with Arena-Hard's "
            "add_markdown_info.py, or generate them again with rto generate"
        )
    counts = (answer.style[name] for name in STYLES)
    return np.array([sum(one.values()) if isinstance(one, dict) else one for one in counts], dtype=np.float64)


def styled_rates(fought: StyledBattles, num_rounds: int, seed: int) -> list[Interval]:
    """The rates of all models at equal style, in the order of `fought.models`, with 95 % of the rounds."""
    scaled = (fought.styles - fought.styles.mean(axis=0)) / np.where(
        (deviation := fought.styles.std(axis=0)) > 0, deviation, 1
    )
    counts = np.ones(len(fought.wins))
    rates = _styled_fit(fought, scaled, counts)
    chance = np.random.default_rng(seed)
    rounds = []
    for _ in range(num_rounds):
        drawn = np.bincount(chance.integers(len(counts), size=len(counts)), minlength=len(counts))
        rounds.append(_styled_fit(fought, scaled, drawn.astype(np.float64)))
    low, high = np.percentile(rounds, (2.5, 97.5), axis=0)
    return [
        Interval(100 * float(rate), 100 * float(least), 100 * float(most))
        for rate, least, most in zip(rates, low, high, strict=True)
    ]


def _styled_fit(fought: StyledBattles, scaled: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Chances of the models against the baseline: ratings of all, and one coefficient for each style.

    The penalty is scikit-learn's default, and every battle stands twice before it: a tie as a win and a loss.
    """
    num_battles, num_models = len(fought.wins), len(fought.models)
    sides = np.zeros((num_battles, 1 + num_models))
    sides[:, 0] = _LOG_BASE
    sides[np.arange(num_battles), 1 + fought.model_of] = -_LOG_BASE
    features = np.concatenate([sides, scaled], axis=1)
    model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-8, max_iter=1000)
    labels = np.concatenate([np.ones(num_battles), np.zeros(num_battles)])
    weights = 2 * np.concatenate([counts * (1 - fought.wins), counts * fought.wins])
    model.fit(np.concatenate([features, features]), labels, sample_weight=weights)
    ratings = np.asarray(model.coef_[0][: 1 + num_models], dtype=np.float64)
    chances: np.ndarray = 1 / (1 + 10 ** (ratings[0] - ratings[1:]))
    return chances
