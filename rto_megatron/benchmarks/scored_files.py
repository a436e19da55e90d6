"""Win rates of files of judgments, found by what they are, and shown as tables that say what they rest on."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from rto_megatron.benchmarks.answer_files import Answers, read_answers
from rto_megatron.benchmarks.arena_judgments import Judgments, Version, by_category, read_judgments
from rto_megatron.benchmarks.arena_scores import (
    PERCENT,
    ArenaScore,
    Interval,
    score,
    styled_battles,
    styled_rates,
)
from rto_megatron.benchmarks.generate import JOURNAL
from rto_megatron.benchmarks.judge import REPLIES
from rto_megatron.benchmarks.length_controlled import (
    Gamed,
    LengthControlled,
    length_controlled,
    read_difficulties,
    read_gamed,
)
from rto_megatron.benchmarks.win_rates import WinRate, bootstrap_interval, read_annotations, win_rate, wins
from rto_megatron.errors import DataError, RecipeError, refuse_if
from rto_megatron.reporting.progress import plain

_UNVERIFIED = "unverified on official data"


@dataclass(frozen=True)
class ScoreOptions:
    """How files are scored.

    Args:
        gamed, reference: of AlpacaEval's length control; both or none.
        answers: folder with Arena-Hard's model_answer/*.jsonl, for style control; None: without.
        baseline: of Arena-Hard's files that do not name it.

    Example:
        ScoreOptions(gamed=None, reference=None, answers=None, baseline=None, num_rounds=100, seed=42)
    """

    gamed: Path | None
    reference: Path | None
    answers: Path | None
    baseline: str | None
    num_rounds: int
    seed: int


@dataclass(frozen=True)
class AlpacaScore:
    """The numbers of one annotations.json.

    Example:
        print(scored.rate.win_rate, scored.controlled)
    """

    rate: WinRate
    interval: Interval  # 95 % of bootstraps over instructions
    controlled: LengthControlled | None  # None: not asked for


@dataclass(frozen=True)
class ArenaPool:
    """The numbers of all models whose judgments were named together.

    Example:
        print(pool.category, [one.model for one in pool.scores])
    """

    version: Version
    category: str
    baseline: str
    judges: tuple[str, ...]
    scores: tuple[ArenaScore, ...]


@dataclass(frozen=True)
class Scores:
    """All that was scored.

    Example:
        Scores(alpaca_eval=(), arena_hard=()).as_json()
    """

    alpaca_eval: tuple[AlpacaScore, ...]
    arena_hard: tuple[ArenaPool, ...]

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def find_files(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files of AlpacaEval's annotations and of Arena-Hard's judgments, in folders too.

    Raises:
        DataError: a path holds none; says where judging is half finished.
    """
    annotations: list[Path] = []
    judgments: list[Path] = []
    problems = []
    for path in paths:
        if path.is_dir():
            found = sorted(path.rglob("annotations.json"))
            lines = [one for one in sorted(path.rglob("*.jsonl")) if one.name not in (JOURNAL, REPLIES)]
            lines = [one for one in lines if "model_answer" not in one.parts]
            if not found and not lines:
                is_half = any(path.rglob(REPLIES))
                why = (
                    "its judging is not finished: repeat the rto judge command"
                    if is_half
                    else "judge answers first"
                )
                problems.append(f"{path} holds neither annotations.json nor judgments (*.jsonl); {why}")
            annotations += found
            judgments += lines
        elif not path.is_file():
            problems.append(f"{path} does not exist")
        else:
            (judgments if path.suffix == ".jsonl" else annotations).append(path)
    refuse_if(problems, "nothing is scored", DataError)
    return annotations, judgments


def score_files(paths: Sequence[Path], options: ScoreOptions) -> Scores:
    """Scores all files; all judgments of Arena-Hard that are named are one pool.

    Raises:
        UserError: a file cannot be scored, or an option has no file that it is for.
    """
    annotations, judgments = find_files(paths)
    if (options.gamed is None) != (options.reference is None):
        raise RecipeError(
            "--gamed and --reference belong together: difficulties go by the instructions' places in the reference"
        )
    if options.gamed is not None and not annotations:
        raise RecipeError("--gamed and --reference are of AlpacaEval, and no annotations.json was named")
    if options.answers is not None and not judgments:
        raise RecipeError("--answers is of Arena-Hard's style control, and no judgments (*.jsonl) were named")
    control = None
    if options.gamed is not None and options.reference is not None:
        gamed = read_gamed(options.gamed)
        control = (read_difficulties(gamed, options.reference), gamed)
    alpaca = tuple(_alpaca_eval(path, options, control) for path in annotations)
    return Scores(alpaca, tuple(_arena_hard(judgments, options)) if judgments else ())


def _alpaca_eval(
    path: Path, options: ScoreOptions, control: tuple[dict[str, float], Gamed] | None
) -> AlpacaScore:
    rows = read_annotations(path)
    try:
        rate = win_rate(rows)
        controlled = None if control is None else length_controlled(rows, *control)
    except DataError as error:
        raise error.about(str(path)) from error
    low, high = bootstrap_interval(wins(rows), options.num_rounds, options.seed)
    return AlpacaScore(rate, Interval(rate.win_rate, 100 * low, 100 * high), controlled)


def _arena_hard(paths: Sequence[Path], options: ScoreOptions) -> list[ArenaPool]:
    pool = [read_judgments(path, options.baseline) for path in paths]
    groups: dict[tuple[Version, str], list[Judgments]] = {}
    for one in pool:
        parts = by_category(one) if one.version == "v2.0" else {"all": one}
        for category, part in parts.items():
            groups.setdefault((one.version, category), []).append(part)
    scored = []
    for (version, category), members in groups.items():
        names = [one.model for one in members]
        if len(set(names)) < len(names):
            raise DataError(
                f"the pool holds a model twice: {', '.join(names)}; name the judgments of one judge"
            )
        scores = [score(one, options.num_rounds, options.seed) for one in members]
        if options.answers is not None:
            wanted = {name for one in members for name in (one.model, one.baseline)}
            answers = _read_pool(options.answers, wanted)
            styled = styled_rates(styled_battles(members, answers), options.num_rounds, options.seed)
            scores = [replace(one, styled=rate) for one, rate in zip(scores, styled, strict=True)]
        baselines, judges = ({getter(one) for one in members} for getter in (_baseline, _judge))
        scored.append(
            ArenaPool(version, category, " or ".join(sorted(baselines)), tuple(sorted(judges)), tuple(scores))
        )
    return scored


def _baseline(judgments: Judgments) -> str:
    return judgments.baseline


def _judge(judgments: Judgments) -> str:
    return judgments.judge


def _read_pool(folder: Path, wanted: Collection[str]) -> dict[str, Answers]:
    """The answers of these models: Arena-Hard's files are named by their model."""
    kept = (JOURNAL, REPLIES)
    files = [
        path for path in sorted(folder.rglob("*.jsonl")) if path.stem in wanted and path.name not in kept
    ]
    found = [read_answers(path) for path in files if "model_judgment" not in path.parts]
    twice = [one for one in found if sum(other.model == one.model for other in found) > 1]
    refuse_if(
        [str(one.path) for one in twice], f"--answers {folder} has several answers of one model", DataError
    )
    return {one.model: one for one in found}


def tables(scores: Scores) -> list[Table]:
    """One table for AlpacaEval and one for each pool of Arena-Hard."""
    shown = [_alpaca_table(scores.alpaca_eval)] if scores.alpaca_eval else []
    return [*shown, *(_arena_table(pool) for pool in scores.arena_hard)]


def _alpaca_table(scored: Sequence[AlpacaScore]) -> Table:
    table = Table(title="AlpacaEval: percent of instructions won")
    for name in ("model", "against", "judged", "win rate", "95 % interval", "discrete"):
        table.add_column(name)
    table.add_column(f"length-controlled\n({_UNVERIFIED})")
    table.add_column("characters")
    for one in scored:
        rate, controlled = one.rate, one.controlled
        judged = f"{rate.num_judged}" + (f", {rate.num_unjudged} not" if rate.num_unjudged else "")
        table.add_row(
            Text(plain(rate.model)),
            Text(plain(rate.baseline)),
            judged,
            f"{rate.win_rate:.2f} ± {rate.standard_error:.2f}",
            f"{one.interval.low:.2f} to {one.interval.high:.2f}",
            f"{rate.discrete_win_rate:.2f}",
            "-"
            if controlled is None
            else f"{controlled.win_rate:.2f} ± {controlled.standard_error:.2f} (C {controlled.strength:.4g})",
            f"{rate.characters:.0f}",
        )
    return table


def _arena_table(pool: ArenaPool) -> Table:
    judges = ", ".join(pool.judges)
    table = Table(
        title=Text(
            plain(
                f"Arena-Hard {pool.version}, {pool.category}: percent won against {pool.baseline}, judge {judges}"
            )
        )
    )
    for name in ("model", "battles", "games not judged", "win rate", f"{PERCENT[pool.version]} % interval"):
        table.add_column(name)
    styled = any(one.styled is not None for one in pool.scores)
    if styled:
        names = ", ".join(one.model for one in pool.scores)
        table.add_column(f"at equal style\n({_UNVERIFIED})")
        table.caption = Text(plain(f"equal style is that of this pool: {names}, and the baseline"))
    for one in pool.scores:
        row: list[str | Text] = [
            Text(plain(one.model)),
            f"{one.num_battles}",
            f"{one.num_unjudged}",
            f"{one.win_rate.rate:.1f} ± {one.standard_error:.1f}",
            f"{one.win_rate.low:.1f} to {one.win_rate.high:.1f}",
        ]
        if one.styled is not None:
            row.append(f"{one.styled.rate:.1f} ({one.styled.low:.1f} to {one.styled.high:.1f})")
        table.add_row(*row)
    return table
