"""Whether RTO's token reward knows what the program knows: which tokens keep a rule, and which break one."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rto_megatron.errors import DataError, RunFolderError
from rto_megatron.experiments.curves import best_factor, run_name, seed_folder
from rto_megatron.experiments.design import Experiment, Rows
from rto_megatron.experiments.language.rules import credit
from rto_megatron.reporting.rollout_files import kept_steps, read_rollouts
from rto_megatron.rewards.sample import Json, Sample

FIRST_STEPS = 10  # of a run, while its policy is near the start that the pairs were sampled from
_COLUMNS = ("prompt_id", "pieces", "finish_reason", "token/dpo_logratio")


@dataclass(frozen=True)
class Attribution:
    """The DPO log-ratio of tokens, by what the program says of them; of one run.

    Args:
        correlation: Pearson's, of log-ratio and credit, over all tokens.
        broke: mean log-ratio in nats of tokens that broke a rule; `kept` and `others` alike. None: there are none.
        ranked: how often a token that broke a rule has a lower log-ratio than another of the same response, ties
            counted as half; mean over the responses with both kinds. 0.5 knows nothing.

    Example:
        Attribution(0.2, broke=-0.3, kept=0.1, others=0.0, ranked=0.7, num_tokens=9000, num_responses=320)
    """

    correlation: float
    broke: float | None
    kept: float | None
    others: float | None
    ranked: float | None
    num_tokens: int
    num_responses: int


def attribution(run_dir: Path, prompts: Path, steps: int = FIRST_STEPS) -> Attribution:
    """Of the first steps of an RTO run on prompts of the task.

    Raises:
        RunFolderError: the run keeps no rollouts of its first step.
        DataError: a prompt of the run is not in the file.
    """
    rules = rules_of(prompts)
    taken = sorted(kept_steps(run_dir))[:steps]
    if not taken or taken[0] > 1:
        kept = f"rollouts from step {taken[0]} on" if taken else "no rollouts"
        raise RunFolderError(
            f"{run_dir} keeps {kept}, and its first steps are asked for; run it with run.keep_rollouts of all its steps"
        )
    ratios: list[list[float]] = []
    paid: list[list[float]] = []
    for one in read_rollouts(run_dir, taken, _COLUMNS).to_pylist():
        if one["prompt_id"] not in rules:
            raise DataError(
                f"{prompts} has no prompt {one['prompt_id']!r}, which {run_dir} sampled; name its data.train"
            )
        ratios.append(one["token/dpo_logratio"])
        paid.append(credit_of(one["prompt_id"], one["pieces"], one["finish_reason"], rules))
    return compared(ratios, paid)


def rules_of(prompts: Path) -> dict[str, Json]:
    """The rules of each prompt of a file that `rto rules` wrote, by its id."""
    rows = map(json.loads, prompts.read_text(encoding="utf-8").splitlines())
    return {row["prompt_id"]: row.get("rules") for row in rows}


def credit_of(
    prompt_id: str, pieces: Sequence[str], finish_reason: str, rules: Mapping[str, Json]
) -> list[float]:
    """The program's credit of each token of a response, whose pieces are as a run keeps them.

    Raises:
        DataError: `rules` has none of this prompt.
    """
    ids, columns = tuple(range(len(pieces))), {"rules": rules.get(prompt_id)}
    return credit(Sample(prompt_id, "", "".join(pieces), (), ids, tuple(pieces), finish_reason, columns))


def compared(ratios: Sequence[Sequence[float]], paid: Sequence[Sequence[float]]) -> Attribution:
    """Log-ratios beside the program's credit, both by response and token."""
    ratio_N, credit_N = np.array([*_flat(ratios)]), np.array([*_flat(paid)])
    orders = [
        _order(one, credit_T)
        for one, credit_T in zip(ratios, paid, strict=True)
        if min(credit_T) < 0 <= max(credit_T)
    ]
    return Attribution(
        correlation=float(np.corrcoef(ratio_N, credit_N)[0, 1]),
        broke=_mean(ratio_N[credit_N < 0]),
        kept=_mean(ratio_N[credit_N > 0]),
        others=_mean(ratio_N[credit_N == 0]),
        ranked=statistics.fmean(orders) if orders else None,
        num_tokens=len(ratio_N),
        num_responses=len(ratios),
    )


def attribution_rows(experiment: Experiment, root: Path) -> Rows:
    """A table of RTO's runs, a row for each seed.

    Raises:
        UserError: one is not there.
    """
    name = run_name("rto", best_factor(experiment, root, "rto"))
    rows: list[Sequence[str]] = [
        (
            "seed",
            "correlation",
            "breaking below others",
            "broke a rule, nats",
            "kept one",
            "others",
            "tokens",
            "responses",
        )
    ]
    for seed in experiment.design.seeds:
        folder = seed_folder(root, seed)
        found = attribution(folder / name, folder / "task/prompts_train.jsonl")
        numbers = (found.correlation, found.ranked, found.broke, found.kept, found.others)
        cells = ("-" if number is None else f"{number:.3f}" for number in numbers)
        rows.append((str(seed), *cells, str(found.num_tokens), str(found.num_responses)))
    return rows


def _flat(rows: Iterable[Sequence[float]]) -> Iterable[float]:
    return (value for row in rows for value in row)


def _mean(values: NDArray[np.floating]) -> float | None:
    return float(values.mean()) if len(values) else None


def _order(ratio_T: Sequence[float], credit_T: Sequence[float]) -> float:
    """The share of pairs of a breaking and another token in which the breaking one is lower."""
    broke = [ratio for ratio, one in zip(ratio_T, credit_T, strict=True) if one < 0]
    others = [ratio for ratio, one in zip(ratio_T, credit_T, strict=True) if one >= 0]
    pairs = [(1.0 if low < high else 0.5 if low == high else 0.0) for low in broke for high in others]
    return statistics.fmean(pairs)
