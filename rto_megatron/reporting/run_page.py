"""One HTML file with a run or two: curves, responses, and the credit of every token. It needs no network.

Text of a run stands in the page as JSON alone, with every character escaped that could end the element it is in; the
script of the page shows it as text. The page's policy admits this script and this style by their hashes, nothing else.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import pyarrow as pa

from rto_megatron.errors import RunFolderError
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.reporting.rollout_files import WHO_WRITES_THEM, kept_steps, read_rollouts
from rto_megatron.reporting.rollout_table import PAID, SOURCE, TOKEN

_MAX_BYTES = 2_000_000  # of a run's responses; with its curves, two runs stay under 5 MB
_MAX_POINTS = 300  # of a curve
_MAX_CURVES_BYTES = 400_000  # of a run
_MAX_PROMPT = 3000  # characters, its end
_FIRST = ("reward_dpo", "kl", "value", "advantage", "reward")  # what people look at first
_OF_RESPONSES = (
    "step",
    "prompt_id",
    "sample",
    "num_tokens",
    "finish_reason",
    "version",
    "age",
    "score",
    "reward",
)

type Number = float | None
type Cell = str | int | float | list[str] | list[int] | dict[str, list[Number]] | None


@dataclass(frozen=True)
class RunView:
    """What the page shows of one run.

    Example:
        RunView("runs/rto", "", {"loss": [(1, 0.5)]}, [], [], [])
    """

    name: str
    note: str
    curves: dict[str, list[tuple[int, Number]]]
    columns: list[str]  # of `rollouts`, with one value for a response
    quantities: list[str]  # that tokens have
    rollouts: list[dict[str, Cell]]


def write_page(
    run_dirs: Sequence[Path], target: Path, steps: Sequence[int] = (), prompt_ids: Sequence[str] = ()
) -> list[RunView]:
    """Writes the page of one or two runs, readable by its owner alone, as the run folders are.

    Args:
        steps: only rollouts of these; none: of all that are kept.
        prompt_ids: only responses to these; none: to all.

    Raises:
        RunFolderError: a run has neither metrics nor rollouts, or not of these steps.
    """
    runs = [view_of(run_dir, steps, prompt_ids) for run_dir in run_dirs]
    page = page_of(runs)
    partial = target.with_name(f".partial_{target.name}")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_text(page, encoding="utf-8")
    partial.replace(target)
    return runs


def page_of(runs: Sequence[RunView]) -> str:
    """The page as text."""
    parts = {
        name: (files("rto_megatron.reporting.view") / f"page.{name}").read_text("utf-8") for name in _PARTS
    }
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash(parts['js'])}",
            f"style-src {_hash(parts['css'])}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    filled = {
        "@POLICY@": policy,
        "@STYLE@": parts["css"],
        "@SCRIPT@": parts["js"],
        "@DATA@": _embedded([asdict(run) for run in runs]),
    }
    page = parts["html"]
    before, *rest = page.split("@")
    # Cut at the marks once, so that nothing in a part is taken for a mark.
    return before + "".join(filled.get(f"@{text}@", text) for text in rest)


_PARTS = ("html", "css", "js")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(value: object) -> str:
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def view_of(run_dir: Path, steps: Sequence[int], prompt_ids: Sequence[str]) -> RunView:
    """What there is to see of a run.

    Raises:
        RunFolderError: see `write_page`.
    """
    entries, is_kept = read_metrics(run_dir), bool(kept_steps(run_dir))
    if not entries and not is_kept:
        raise RunFolderError(
            f"{run_dir} holds neither metrics.jsonl nor rollouts; name the folder of a run (run.dir)"
        )
    curves = _curves(entries)
    if not is_kept:
        if steps or prompt_ids:
            read_rollouts(run_dir, steps)  # says why there is nothing to choose from
        return RunView(str(run_dir), f"No rollouts are kept here: {WHO_WRITES_THEM}.", curves, [], [], [])
    table = read_rollouts(run_dir, steps)
    # Of a long run only the few rows that are shown become Python's numbers.
    places = [
        place
        for place, prompt_id in enumerate(table["prompt_id"].to_pylist())
        if not prompt_ids or prompt_id in prompt_ids
    ]
    if not places:
        raise RunFolderError(
            f"{run_dir} keeps no rollouts of prompt {', '.join(prompt_ids)}; `rto rollouts` shows which there are"
        )
    columns = _response_columns(table)
    spread = _spread(places, table["step"].to_pylist())
    shown = list(_fitting(_cells(table.slice(place, 1).to_pylist()[0], columns) for place in spread))
    shown.sort(key=lambda cells: str(cells["prompt_id"]))
    shown.sort(key=lambda cells: -int(str(cells["step"])))
    note = (
        f"{len(shown)} of {len(places)} responses are shown"
        if len(shown) < len(places)
        else f"{len(places)} responses"
    )
    tokens = shown[0]["tokens"]
    assert isinstance(tokens, dict)
    return RunView(str(run_dir), note, curves, columns, list(tokens), shown)


def _curves(entries: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[int, Number]]]:
    """Name -> (step, value); of a long run as many points as a small drawing shows."""
    names = sorted({name for entry in entries for name in entry} - {"step", "time"})
    points = min(_MAX_POINTS, max(20, _MAX_CURVES_BYTES // (16 * max(1, len(names)))))
    curves: dict[str, list[tuple[int, Number]]] = {}
    for name in names:
        found = [(int(entry["step"]), _rounded(entry[name])) for entry in entries if name in entry]
        stride = math.ceil(len(found) / points)
        # Counted from the last one, so that it is there.
        curves[name] = found[::-1][::stride][::-1]
    return curves


def _response_columns(table: pa.Table) -> list[str]:
    of_sources = [name for name in table.column_names if name.startswith((SOURCE, PAID))]
    return [name for name in _OF_RESPONSES if name in table.column_names] + of_sources


def _spread(places: Sequence[int], steps: Sequence[int]) -> Iterator[int]:
    """The place of one row of every step, the newest first, then the next of every step, so that all steps are seen."""
    by_step: dict[int, list[int]] = {}
    for place in places:
        by_step.setdefault(steps[place], []).append(place)
    newest_first = [by_step[step] for step in sorted(by_step, reverse=True)]
    for number in range(max(map(len, newest_first))):
        yield from (of_step[number] for of_step in newest_first if number < len(of_step))


def _fitting(rows: Iterable[dict[str, Cell]]) -> Iterator[dict[str, Cell]]:
    """As many rows as the page has room for, and at least one."""
    left = _MAX_BYTES
    for number, row in enumerate(rows):
        left -= len(_embedded(row))
        if left < 0 and number:
            return
        yield row


def _cells(row: Mapping[str, Cell], columns: Sequence[str]) -> dict[str, Cell]:
    tokens = {name.removeprefix(TOKEN): _list(row[name]) for name in row if name.startswith(TOKEN)}
    sampled = tokens.pop("sampled")
    policy, pool, reference = (tokens[f"logp_{name}"] for name in ("policy", "pool", "ref"))
    tokens["kl"] = [_less(one, other) for one, other in zip(policy, reference, strict=True)]
    tokens["gap"] = [
        _less(one, other) if is_sampled else None
        for one, other, is_sampled in zip(pool, policy, sampled, strict=True)
    ]
    ordered = [*_FIRST, *sorted(name for name in tokens if name not in _FIRST)]
    prompt = row["prompt"]
    assert isinstance(prompt, str)
    return {
        **{name: _rounded(value) if isinstance(value := row[name], float) else value for name in columns},
        "prompt": prompt[-_MAX_PROMPT:],
        "pieces": row["pieces"],
        "response_ids": row["response_ids"],
        "tokens": {name: [_rounded(value) for value in tokens[name]] for name in ordered},
    }


def _list(values: Cell) -> list[Number]:
    assert isinstance(values, list)
    return [None if value is None else float(value) for value in values]


def _less(first: Number, second: Number) -> Number:
    return None if first is None or second is None else first - second


def _rounded(value: Number) -> Number:
    """Four digits, as the page shows them; None for what is not finite."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
