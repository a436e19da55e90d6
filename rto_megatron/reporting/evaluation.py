"""What the evaluate stage measures, the file it leaves in its run folder, and the table of several."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text

from rto_megatron.config.run_folder import make_run_folder
from rto_megatron.errors import RunFolderError
from rto_megatron.reporting.progress import plain

FILE_NAME = "evaluation.json"


@dataclass(frozen=True)
class Estimate:
    """A mean over sampled responses with its standard error.

    Example:
        Estimate(mean=14.2, standard_error=0.6)
    """

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error (sample deviation over root n) of independent values; one per prompt."""
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1) if count > 1 else math.nan
    return Estimate(mean, math.sqrt(variance / count))


@dataclass(frozen=True)
class Evaluation:
    """One row of the final table.

    Example:
        print(evaluation.name, evaluation.kl.mean)
    """

    name: str
    true_return: Estimate | None  # None where the task has no known reward
    score: Estimate | None  # of the reward model, normalised, or of all `rewards`; None where none was named
    kl: Estimate  # to the reference, nats per response
    response_tokens: Estimate
    num_prompts: int
    num_responses: int
    steps: int | None = None  # that the policy was trained for; None: by no stage, or by one that did not say
    rewards: Mapping[str, Estimate] = field(default_factory=dict)  # what each source of `rewards` gave


def save_evaluation(evaluation: Evaluation, run_dir: Path) -> Path:
    """Write `run_dir`/evaluation.json and return its path."""
    make_run_folder(run_dir)
    path = run_dir / FILE_NAME
    path.write_text(json.dumps(asdict(evaluation), indent=2) + "\n", encoding="utf-8")
    return path


def read_evaluations(root: Path) -> list[Evaluation]:
    """The evaluations in `root` and its folders, ordered SFT, DPO, PPO, RTO, others.

    Raises:
        RunFolderError: there is none, or one cannot be read.
    """
    files = sorted(root.rglob(FILE_NAME))
    if not files:
        raise RunFolderError(
            f"{root}: holds no {FILE_NAME}, neither itself nor in a folder; run the evaluate recipe first"
        )
    order = {"sft": 0, "dpo": 1, "ppo": 2, "rto": 3}
    rows = [_read(file) for file in files]
    return sorted(rows, key=lambda row: (order.get(row.name.lower(), len(order)), row.name))


def read_evaluation(run_dir: Path) -> Evaluation:
    """The evaluation in `run_dir`.

    Raises:
        RunFolderError: it is missing or cannot be read.
    """
    file = run_dir / FILE_NAME
    if not file.is_file():
        raise RunFolderError(f"{file} does not exist; run the evaluate recipe first")
    return _read(file)


def final_table(evaluations: Sequence[Evaluation], title: str) -> Table:
    """One row per evaluated policy, with true returns and what each source of `rewards` gave, if any has them."""
    table = Table(title=Text(plain(title)))
    table.add_column("system")
    sources = sorted({name for row in evaluations for name in row.rewards})
    score = "sum of rewards" if sources else "reward model"
    true = ["true return"] if any(row.true_return is not None for row in evaluations) else []
    for name in (
        *true, score, *sources, "KL to reference", "response tokens", "prompts", "responses", "steps",
    ):  # fmt: skip
        table.add_column(Text(plain(name)), justify="right")
    for row in evaluations:
        table.add_row(
            Text(plain(row.name)),
            *(str(row.true_return or "-") for _ in true),
            str(row.score or "-"),
            *(str(row.rewards.get(name, "-")) for name in sources),
            str(row.kl),
            f"{row.response_tokens.mean:.1f}",
            str(row.num_prompts),
            str(row.num_responses),
            "-" if row.steps is None else str(row.steps),
        )
    return table


def verdict(evaluations: Sequence[Evaluation]) -> str:
    """What true returns, or without them each source of `rewards`, say of RTO against the others.

    Differences are in standard errors of the difference of two independent means; where both policies answered the
    same prompts that is more than the difference scatters.
    """
    counts = Counter(row.name.lower() for row in evaluations)
    if often := sorted(name for name, count in counts.items() if count > 1):
        return f"No verdict: several evaluations are called {', '.join(often)}; name a folder that holds one of each."
    returns = {row.name.lower(): row.true_return for row in evaluations if row.true_return is not None}
    ours, start = returns.get("rto"), returns.get("sft")
    if ours is None or start is None:
        return _verdict_by_sources({row.name.lower(): row for row in evaluations})
    distance = _distance(ours, start)
    claim = "beats SFT by more than" if distance > 3 else "does not beat SFT by"
    lines = [f"RTO {claim} three standard errors of the difference ({distance:+.1f})."]
    rival = returns.get("ppo")
    if rival is not None:
        lines.append(f"RTO against PPO: {_distance(ours, rival):+.1f} standard errors.")
    return " ".join(lines)


def _verdict_by_sources(rows: Mapping[str, Evaluation]) -> str:
    ours = rows.get("rto")
    said = []
    for source, own in () if ours is None else ours.rewards.items():
        others = {
            name: row.rewards[source] for name, row in rows.items() if name != "rto" and source in row.rewards
        }
        if others:
            compared = ", ".join(
                f"{_distance(own, other):+.1f} against {name}" for name, other in others.items()
            )
            said.append(f"RTO by {source}, in standard errors of the difference: {compared}.")
    return "\n".join(said) or (
        "No verdict: it needs a policy called RTO and another one, evaluated with true returns or the same `rewards`."
    )


def _distance(first: Estimate, second: Estimate) -> float:
    """NaN where an error is not known, of one prompt alone; equal means that do not scatter are 0 apart."""
    apart, error = first.mean - second.mean, math.hypot(first.standard_error, second.standard_error)
    if error == 0:
        return math.copysign(math.inf, apart) if apart else 0.0
    return apart / error


def _read(file: Path) -> Evaluation:
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
        return Evaluation(
            name=entry["name"],
            true_return=_optional(entry["true_return"]),
            score=_optional(entry["score"]),
            kl=Estimate(**entry["kl"]),
            response_tokens=Estimate(**entry["response_tokens"]),
            num_prompts=entry["num_prompts"],
            num_responses=entry["num_responses"],
            steps=entry.get("steps"),
            rewards={name: Estimate(**one) for name, one in entry.get("rewards", {}).items()},
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{file}: is not a complete evaluation ({error}); run the evaluate recipe again"
        ) from error


def _optional(entry: dict[str, float] | None) -> Estimate | None:
    return Estimate(**entry) if entry is not None else None
