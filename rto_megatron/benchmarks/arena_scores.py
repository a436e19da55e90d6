"""Arena-Hard's win rates with intervals, and the win rate at equal style, of a pool of models.

Source: show_result.py and utils_math.py of v0.1, show_result.py and utils/math_utils.py of v2.0. The plain rate is the
Bradley-Terry model's: as every model meets the baseline alone, its maximum is (wins + ties / 2) / battles, whatever
else is in the pool. At equal style it is not: coefficients of style and their scales are the whole pool's, so that a
rate has no meaning without naming the pool. Both versions measure style, and fit, in ways of their own. Formulas of
v0.1 agree with tests/golden/eval.json; style control was never run on the official verdicts.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from rto_megatron.benchmarks.answer_files import Answers
from rto_megatron.benchmarks.arena_judgments import Battles, Judgments, Version, battles
from rto_megatron.benchmarks.win_rates import bootstrap_interval, standard_error
from rto_megatron.errors import DataError, refuse_if

STYLES = ("token_len", "header_count", "list_count", "bold_count")
# Of the rounds of a bootstrap that an interval holds.
PERCENT: Mapping[Version, int] = {"v0.1": 95, "v2.0": 90}
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
    low, high = bootstrap_interval(fought.wins, num_rounds, seed, PERCENT[judgments.version])
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
        StyledBattles("v0.1", ("rto",), np.array([0]), np.array([1.0]), np.array([[0.2, 0.0, 0.1, 0.0]]))
    """

    version: Version
    models: tuple[str, ...]
    model_of: np.ndarray  # [battles], index into `models`
    wins: np.ndarray  # [battles], of the model
    styles: np.ndarray  # [battles, 4], by how much the answers differ, as the version measures it


def styled_battles(pool: Sequence[Judgments], answers: Mapping[str, Answers]) -> StyledBattles:
    """Joins verdicts and the styles of answers.

    Args:
        pool: one for each model, of one version and category and against one baseline.
        answers: by model, the baseline's among them.

    Raises:
        DataError: names every model and question without counts, and verdicts that cannot be joined.
    """
    problems = []
    baselines = sorted({one.baseline for one in pool})
    if len(baselines) > 1:
        problems.append(f"the pool was judged against {', '.join(baselines)}; expected one baseline")
    wanted = [*baselines, *(one.model for one in pool)]
    problems += [f"no answers of {name} in the folder of answers" for name in wanted if name not in answers]
    refuse_if(problems, "style control is not possible", DataError)
    version = pool[0].version
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
            styles.append(_RULES[version].differ(a, b))
    refuse_if(list(dict.fromkeys(problems)), "style control is not possible", DataError)
    return StyledBattles(
        version,
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
            f"{answers.path}: answers have no counts of style (conv_metadata, of v2.0 metadata); add them with "
            "Arena-Hard's add_markdown_info.py, or generate them again with rto generate"
        )
    counts = (answer.style[name] for name in STYLES)
    return np.array([sum(one.values()) if isinstance(one, dict) else one for one in counts], dtype=np.float64)


def styled_rates(fought: StyledBattles, num_rounds: int, seed: int) -> list[Interval]:
    """The rates of all models at equal style, in the order of `fought.models`, with the interval of the version.

    The rate is that of all battles; v2.0's own code shows the median of its rounds, which scatters about it.
    """
    rule = _RULES[fought.version]
    scaled = (fought.styles - fought.styles.mean(axis=0)) / np.where(
        (deviation := fought.styles.std(axis=0, ddof=rule.ddof)) > 0, deviation, 1
    )
    counts = np.ones(len(fought.wins))
    rates = rule.fit(fought, scaled, counts)
    chance = np.random.default_rng(seed)
    rounds = []
    for _ in range(num_rounds):
        drawn = np.bincount(chance.integers(len(counts), size=len(counts)), minlength=len(counts))
        rounds.append(rule.fit(fought, scaled, drawn.astype(np.float64)))
    outside = (100 - PERCENT[fought.version]) / 2
    low, high = np.percentile(rounds, (outside, 100 - outside), axis=0)
    return [
        Interval(100 * float(rate), 100 * float(least), 100 * float(most))
        for rate, least, most in zip(rates, low, high, strict=True)
    ]


def _differ_01(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray((a - b) / (a + b + 1))


def _differ_20(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Lengths by their share of both, marks by how densely they stand."""
    length = (b[:1] - a[:1]) / np.maximum(a[:1] + b[:1], 1)
    dense_a, dense_b = (one[1:] / (one[:1] + 1) for one in (a, b))
    return np.concatenate([length, (dense_b - dense_a) / (dense_a + dense_b + 1)])


def _fit_01(fought: StyledBattles, scaled: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Chances of the models against the baseline: ratings of all, and one coefficient for each style.

    The penalty is scikit-learn's default, and every battle stands twice before it: a tie as a win and a loss.
    """
    num_battles, num_models = len(fought.wins), len(fought.models)
    sides = np.zeros((num_battles, 1 + num_models))
    sides[:, 0] = _LOG_BASE
    sides[np.arange(num_battles), 1 + fought.model_of] = -_LOG_BASE
    found = _coefficients(np.concatenate([sides, scaled], axis=1), 1 - fought.wins, 2 * counts, strength=1.0)
    chances: np.ndarray = 1 / (1 + 10 ** (found[0] - found[1 : 1 + num_models]))
    return chances


def _fit_20(fought: StyledBattles, scaled: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The same by the likeliest model: without a penalty the baseline's rating may be 0."""
    num_battles, num_models = len(fought.wins), len(fought.models)
    sides = np.zeros((num_battles, num_models))
    sides[np.arange(num_battles), fought.model_of] = 1
    found = _coefficients(np.concatenate([sides, scaled], axis=1), fought.wins, counts, strength=math.inf)
    chances: np.ndarray = 1 / (1 + np.exp(-found[:num_models]))
    return chances


def _coefficients(features: np.ndarray, wins: np.ndarray, counts: np.ndarray, strength: float) -> np.ndarray:
    """Of a logistic model without intercept, L2-penalised by 1 / `strength`; each row counts as a win and as a loss."""
    model = LogisticRegression(C=strength, fit_intercept=False, tol=1e-8, max_iter=1000)
    labels = np.concatenate([np.ones(len(wins)), np.zeros(len(wins))])
    weights = np.concatenate([counts * wins, counts * (1 - wins)])
    model.fit(np.concatenate([features, features]), labels, sample_weight=weights)
    return np.asarray(model.coef_[0], dtype=np.float64)


@dataclass(frozen=True)
class _StyleRule:
    """How a version controls style."""

    # Of counts of the baseline's answer and the model's.
    differ: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ddof: int  # of the deviations by which differences are scaled
    fit: Callable[[StyledBattles, np.ndarray, np.ndarray], np.ndarray]


_RULES: Mapping[Version, _StyleRule] = {
    "v0.1": _StyleRule(_differ_01, 0, _fit_01),
    "v2.0": _StyleRule(_differ_20, 1, _fit_20),
}
