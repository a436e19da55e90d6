"""`rto resume-check`: proves on this machine that a run which is stopped goes on as if it had not been."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rto_megatron.cli.options import Overrides
from rto_megatron.config.training import TrainParallelConfig
from rto_megatron.errors import RecipeError

if TYPE_CHECKING:
    from rto_megatron.config.schema import TrainStage
    from rto_megatron.proofs.resume_compare import Item

_ROUNDING = 0.02  # what two layouts may differ by, as `told` measures it

type Train = Callable[["TrainStage", int], None]  # trains a configuration on so many ranks


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(resume_check)
    app.command(hidden=True)(resume_check_rank)


def resume_check(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="YAML file of a training stage, or the folder of a run.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    steps: Annotated[
        int, typer.Option(min=1, help="k: the run has 2k steps, and is resumed after the first k.")
    ] = 2,
    replicas: Annotated[
        int, typer.Option(min=1, help="Data-parallel size: ranks are tensor x pipeline x replicas.")
    ] = 1,
    resume_at: Annotated[
        str | None,
        typer.Option(
            metavar="TPxPPxDP[xEP][,context=N][,virtual=N]",
            help="Resume at another layout, as in 1x2x1, and compare up to rounding; EP: parts of the experts.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="With --resume-at: largest relative difference; default: 0.02."),
    ] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Keep both runs in this new folder; default: a temporary one.")
    ] = None,
) -> None:
    """Run 2k steps, and the last k of them again from the checkpoint of step k; compare everything, bit for bit.

    Both runs are given the same responses by a script in place of a pool. The recipe's own run folder is not touched.
    """
    if tolerance is not None and resume_at is None:
        raise RecipeError(
            f"--tolerance {tolerance:g} has no effect without --resume-at: at the run's own layout everything is "
            "compared bit for bit; remove it, or name another layout"
        )
    _require_empty(scratch)
    from rto_megatron.config.training import ParallelConfig
    from rto_megatron.platform.device import prepare

    device = prepare()
    from rto_megatron.proofs.resume_compare import compare, compare_layouts
    from rto_megatron.proofs.resumed_runs import read_config
    from rto_megatron.trainer.stages import ranks

    config = read_config(recipe, overrides or [])
    parallel, num_ranks = resumed_layout(config, resume_at, replicas)
    with tempfile.TemporaryDirectory(prefix="resume-check-") as temporary:
        root = scratch or Path(temporary)
        run_both(config, steps, replicas, parallel, num_ranks, root, _train)
        with ranks(device, ParallelConfig(), config.run.seed):
            judge = compare if resume_at is None else compare_layouts
            items = judge(root / "whole", root / "resumed", steps)
    allowed = _ROUNDING if tolerance is None else tolerance
    if not told(items, 0.0 if resume_at is None else allowed, typer.echo):
        raise typer.Exit(1)


def _require_empty(scratch: Path | None) -> None:
    if scratch is not None and scratch.exists() and not (scratch.is_dir() and not any(scratch.iterdir())):
        raise RecipeError(f"--scratch {scratch}: expected a new or empty folder; name another one")


def resume_check_rank(config: Annotated[Path, typer.Argument(help="A saved configuration.")]) -> None:
    """One rank of one of the two runs."""
    from rto_megatron.config.load import load_recipe
    from rto_megatron.lifecycle.stopping import die_with_parent
    from rto_megatron.platform.device import prepare, sum_in_one_order

    die_with_parent()
    prepare(load_recipe(config, []).precision)
    sum_in_one_order()
    from rto_megatron.proofs.resumed_runs import read_config, run_observed

    run_observed(read_config(config, []))


def resumed_layout(
    config: "TrainStage", resume_at: str | None, replicas: int
) -> "tuple[TrainParallelConfig, int]":
    """The layout of the resumed run, and its ranks.

    Args:
        resume_at: see `resume_check`; None: the run's own.

    Raises:
        RecipeError: `resume_at` is no layout.
    """
    from rto_megatron.config.plan import fewest_ranks

    own = config.parallel
    if resume_at is None:
        return own, fewest_ranks(own, replicas)
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:x(\d+))?((?:,(?:context|virtual)=\d+)*)", resume_at)
    numbers = [] if found is None else [int(number or 1) for number in found.groups()[:4]]
    named = {} if found is None else {key: int(n) for key, n in re.findall(r"(\w+)=(\d+)", found[5])}
    if not numbers or 0 in (*numbers, *named.values()):
        raise RecipeError(
            f"--resume-at {resume_at}: expected tensor x pipeline x data-parallel size, as in 1x2x1, for a mixture the "
            "parts of its experts behind them, as in 1x1x2x2, and whatever there is of context and virtual, as in "
            "1x2x1,context=2,virtual=2"
        )
    tensor, pipeline, data, expert = numbers
    cut = {"context": 1, "virtual": 1, **named, "tensor": tensor, "pipeline": pipeline, "expert": expert}
    plain: dict[str, object] = {"stages": None, "expert_tensor": None, "roles": {}}
    changed = own.model_copy(update={**plain, **cut})
    return changed, changed.replica_ranks * data


def run_both(
    config: "TrainStage",
    k: int,
    replicas: int,
    parallel: "TrainParallelConfig",
    num_ranks: int,
    root: Path,
    train: Train,
) -> None:
    """Both runs, in `root`/whole and `root`/resumed.

    Args:
        parallel, num_ranks: of the resumed run.
        train: starts fresh processes, so that nothing but the checkpoint passes from one run to the other.
    """
    from rto_megatron.config.plan import fewest_ranks
    from rto_megatron.proofs.resumed_runs import resumed_run, whole_run

    whole = whole_run(config, k, root / "whole")
    train(whole, fewest_ranks(whole.parallel, replicas))
    train(resumed_run(whole, k, root / "resumed", parallel), num_ranks)


def _train(config: "TrainStage", num_ranks: int) -> None:
    from rto_megatron.launching.torchrun import start_ranks

    failure = start_ranks(num_ranks, ["resume-check-rank", str(config.run.dir / "config.yaml")])
    if failure is not None:
        typer.echo(f"error: rank {failure.rank} failed in {config.run.dir}; nothing was compared", err=True)
        raise typer.Exit(1)


def told(items: "list[Item]", tolerance: float, say: Callable[[str], None]) -> bool:
    """Prints the table and the verdict; True if the resume kept everything."""
    width = max(len(item.name) for item in items)
    for item in items:
        result = "equal" if item.difference == 0 else f"{item.difference:.3g}"
        if tolerance and 0 < item.difference <= tolerance:
            result += " (rounding)"
        say(f"{item.name:{width}}  {result}" + (f"  at {item.where}" if item.where else ""))
    lost = [item for item in items if not item.is_within(tolerance)]
    if lost:
        say(f"the resumed run differs, first in {lost[0].name}: {lost[0].where}")
        return False
    exact = "bit for bit" if tolerance == 0 else f"up to a relative difference of {tolerance:g}"
    say(f"the resumed run equals the whole one {exact}, in {len(items)} items")
    return True
