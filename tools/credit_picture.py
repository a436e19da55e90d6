"""Draws responses of a run as their tokens, coloured by what each earned: a picture of what `rto view` shows.

.venv/bin/python tools/credit_picture.py RUN_FOLDER/rto --step 10 --rules RUN_FOLDER/task/prompts_train.jsonl

With --rules, tokens by which the program sees a rule kept have a green line below, those that broke one a black line.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no display

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from rto_megatron.experiments.language.attribution import credit_of, rules_of
from rto_megatron.reporting.rollout_query import RolloutQuery, find_rollouts

_LINE_WIDTH = 0.98  # of the axes
_MARKS = re.compile(r"<\|[^|]*\|>")  # of a chat template
_MAX_PROMPT = 150  # characters, from its end


def drawn(
    axes: Axes,
    row: dict[str, object],
    values: Sequence[float],
    paid: Sequence[float],
    scale: Normalize,
    top: float,
) -> float:
    """Writes one response from `top` downwards, in the coordinates of the axes; returns where it ends.

    Args:
        values: of each token, its colour.
        paid: of each token, the line below it: green above 0, black below, none at 0.
    """
    colours = mpl.colormaps["RdBu"]
    prompt = " ".join(_MARKS.sub(" ", str(row["prompt"])).split()).replace("$", r"\$")
    shown = prompt if len(prompt) <= _MAX_PROMPT else "... " + prompt[-_MAX_PROMPT:]
    text = axes.text(0.0, top, shown, fontsize=8, color="0.35", va="top")
    left, top = 0.0, top - 2.2 * _height(text)
    pieces = row["pieces"]
    assert isinstance(pieces, list)
    for piece, value, credit in zip(pieces, values, paid, strict=True):
        shown = str(piece).replace("\n", "\\n").replace("$", r"\$")
        background = {"facecolor": colours(scale(value)), "edgecolor": "none", "pad": 1.5}
        text = axes.text(left, top, shown, fontsize=11, family="monospace", va="top", bbox=background)
        width = _extent(text)
        if left + width > _LINE_WIDTH:
            left, top = 0.0, top - 2.0 * _height(text)
            text.set_position((left, top))
        if credit != 0:
            below = top - 1.3 * _height(text)
            colour = "green" if credit > 0 else "black"
            axes.plot((left, left + width), (below, below), color=colour, linewidth=3, solid_capstyle="butt")
        left += width
    score, reward = (row[name] for name in ("score", "reward"))
    note = f"score {score:+.2f}, all token rewards {reward:+.2f}"
    sources = {
        name.removeprefix("source/"): value for name, value in row.items() if name.startswith("source/")
    }
    note += "".join(f", {name} {value:.2f}" for name, value in sources.items())
    top -= 2.0 * _height(text)
    axes.text(0.0, top, note, fontsize=8, color="0.35", va="top")
    return top - 3.2 * _height(text)


def _extent(text: mpl.text.Text) -> float:
    return float(_box(text).width)


def _height(text: mpl.text.Text) -> float:
    return float(_box(text).height)


def _box(text: mpl.text.Text) -> mpl.transforms.Bbox:
    assert text.axes is not None
    return text.get_window_extent().transformed(text.axes.transAxes.inverted())


def main() -> None:
    """Draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder that keeps rollouts")
    parser.add_argument("--step", type=int, help="default: the last that is kept")
    parser.add_argument(
        "--prompt", action="append", default=[], help="id of a prompt; may be given several times"
    )
    parser.add_argument("--limit", type=int, default=4, help="responses (default 4)")
    parser.add_argument(
        "--by", default="dpo_logratio", help="token column without token/ (default dpo_logratio)"
    )
    parser.add_argument(
        "--sort", default="reward", help="column by which the highest are taken (default reward)"
    )
    parser.add_argument(
        "--rules", type=Path, help="the run's prompts, of `rto rules`: marks what the program saw"
    )
    parser.add_argument("--out", type=Path, default=Path("credit.png"))
    given = parser.parse_args()
    steps = () if given.step is None else (given.step,)
    query = RolloutQuery(steps, tuple(given.prompt), sort=given.sort, is_descending=True)
    rows = find_rollouts(given.run, query).to_pylist()[: given.limit]
    columns = [row[f"token/{given.by}"] for row in rows]
    widest = max(abs(value) for column in columns for value in column)
    scale = Normalize(-widest, widest)
    figure = pyplot.figure(figsize=(11, 1.0 * len(rows) + 0.2), dpi=130)
    # Before the texts: what they measure is in units of the axes, which a bar would shrink.
    axes, beside = figure.add_axes((0.01, 0.02, 0.88, 0.96)), figure.add_axes((0.91, 0.06, 0.015, 0.88))
    axes.axis("off")
    figure.colorbar(mpl.cm.ScalarMappable(scale, "RdBu"), cax=beside, label=f"{given.by} of a token")
    axes.set(xlim=(0, 1), ylim=(0, 1))  # lines are in units of data, texts of the axes
    rules = {} if given.rules is None else rules_of(given.rules)
    top = 1.0
    for row, column in zip(rows, columns, strict=True):
        said = row["prompt_id"], row["pieces"], row["finish_reason"]
        top = drawn(axes, row, column, credit_of(*said, rules) if rules else [0.0] * len(column), scale, top)
    figure.savefig(given.out, bbox_inches="tight")
    print(given.out)


if __name__ == "__main__":
    main()
