"""Preference pairs of responses that a reward has rated, with labels drawn from the Bradley-Terry model."""

import json
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

from rto_megatron.config.problems import suggestion
from rto_megatron.config.source_names import absolute
from rto_megatron.data.layouts import PROMPTS
from rto_megatron.data.messages import Message, Turn
from rto_megatron.data.row import Row
from rto_megatron.data.rows import row_id
from rto_megatron.data.sources import read_rows
from rto_megatron.data.turns import TEMPLATE_COLUMNS
from rto_megatron.errors import DataError
from rto_megatron.platform.whole_files import write_whole


@dataclass(frozen=True)
class Rated:
    """A response and what a reward gave it.

    Example:
        Rated(text="Four.", reward=1.0, is_cut=False)
    """

    text: str
    reward: float
    is_cut: bool


@dataclass(frozen=True)
class PairCounts:
    """What became of the responses, two by two.

    Example:
        PairCounts(written=900, ties=100, cut=40, empty=0, turned=90)
    """

    written: int
    ties: int  # of equal reward, about which a label would say nothing
    cut: int  # the chosen one was cut: the data would teach to end where it was
    empty: int  # one of the two has no text
    turned: int  # written pairs whose chosen response is the worse one

    def __str__(self) -> str:
        share = self.turned / self.written if self.written else 0.0
        return (
            f"{self.written} pairs, {share:.1%} with the worse response chosen; left out: {self.ties} of equal "
            f"reward, {self.cut} whose chosen response was cut, {self.empty} with an empty one"
        )


def write_pairs(responses: str, prompts: str, out: Path, by: str, noise: float, seed: int) -> PairCounts:
    """Writes pairs of the responses to each prompt, in the layout of TRL (prompt, chosen, rejected, as turns).

    Responses are taken two by two in their order, so that each stands in one pair at most. The first is chosen with
    probability sigmoid((its reward - the other's) / noise), as in Bradley and Terry's model.

    Args:
        responses: rows with prompt_id, response, finish_reason and rewards, as an evaluation keeps them.
        prompts: where the prompts stand with these ids.
        by: the column of `responses` that holds the reward.
        noise: in units of the reward; 0: the better one is always chosen.

    Raises:
        DataError: a prompt or a column is missing, or no pair is left.
        RunFolderError: `out` is a folder.
    """
    rated = _rated(responses, by)
    # Rows without an id are known by their place, which a run names absolutely.
    asked = {row_id(row): row for row in read_rows(absolute(prompts))}
    missing = [prompt_id for prompt_id in rated if prompt_id not in asked]
    if missing:
        raise DataError(
            f"{prompts} has no prompt {missing[0]!r}, which {responses} answers ({len(missing)} such prompts); name "
            "the file that the responses were sampled for"
        )
    draw, lines = random.Random(seed), list[str]()
    ties = cut = empty = turned = 0
    for prompt_id, answers in rated.items():
        for first, second in _twos(answers):
            is_empty = not (first.text.strip() and second.text.strip())
            if is_empty or first.reward == second.reward:
                empty += is_empty
                ties += not is_empty
                continue
            chosen, rejected = _labelled(first, second, noise, draw)
            if chosen.is_cut:
                cut += 1
                continue
            turned += chosen.reward < rejected.reward
            lines.append(_line(asked[prompt_id], prompt_id, chosen, rejected))
    counts = PairCounts(len(lines), ties, cut, empty, turned)
    if not lines:
        raise DataError(f"{responses}: no pair is left ({counts}); sample more responses to each prompt")
    write_whole(out, "\n".join(lines) + "\n")
    return counts


def _rated(responses: str, by: str) -> dict[str, list[Rated]]:
    found: dict[str, list[Rated]] = defaultdict(list)
    asked: dict[str, object] = {}
    for row in read_rows(responses):
        reward, text = row.columns.get(by), row.columns.get("response")
        if not isinstance(reward, int | float) or not math.isfinite(reward):
            numbers = [name for name, value in row.columns.items() if isinstance(value, int | float)]
            there = (
                f"columns with numbers are {', '.join(numbers)}{suggestion(by, numbers)}"
                if numbers
                else "no column has one: name responses that have been rated, as the stage evaluate writes them"
            )
            raise DataError(f"{row.where}: found {reward!r} in the column {by!r}, expected a number; {there}")
        if "prompt_id" not in row.columns or not isinstance(text, str):
            raise DataError(
                f"{row.where}: a response has the columns prompt_id and response, as the stage evaluate writes them"
            )
        prompt_id, prompt = row_id(row), row.columns.get("prompt")
        if asked.setdefault(prompt_id, prompt) != prompt:
            raise DataError(
                f"{row.where}: its prompt_id is {prompt_id!r}, as that of another prompt before it, whose responses "
                "it would be paired with; evaluate again with a prompt_id (or id) of its own for every prompt"
            )
        is_cut = row.columns.get("finish_reason") == "length"
        found[prompt_id].append(Rated(text, float(reward), is_cut))
    return found


def _twos(answers: Sequence[Rated]) -> Iterator[tuple[Rated, Rated]]:
    for two in batched(answers, 2):
        if len(two) == 2:
            yield two


def _labelled(first: Rated, second: Rated, noise: float, draw: random.Random) -> tuple[Rated, Rated]:
    lead = first.reward - second.reward
    if noise == 0:
        return (first, second) if lead > 0 else (second, first)
    # Beyond 700 the exponential leaves the range of floats, and the label has long been certain.
    is_first = draw.random() < 1 / (1 + math.exp(min(700.0, -lead / noise)))
    return (first, second) if is_first else (second, first)


def _line(row: Row, prompt_id: str, chosen: Rated, rejected: Rated) -> str:
    prompt: list[Turn] = [message.turn() for message in PROMPTS.read(row).value]
    beside = {column: row.columns[column] for column in TEMPLATE_COLUMNS if column in row.columns}
    pair = {
        "prompt_id": prompt_id,
        "prompt": prompt,
        "chosen": [Message("assistant", chosen.text).turn()],
        "rejected": [Message("assistant", rejected.text).turn()],
        "chosen_reward": chosen.reward,
        "rejected_reward": rejected.reward,
        **beside,
    }
    return json.dumps(pair, ensure_ascii=False)
