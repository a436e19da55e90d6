"""`rto rollouts`: the responses that a run keeps, filtered, sorted and printed."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(rollouts)


def rollouts(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    step: Annotated[
        list[int] | None, typer.Option(help="Only this step, counted from 1; may be given several times.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Only responses to the prompt with this id; several may be given."),
    ] = None,
    at_least: Annotated[float | None, typer.Option(help="Only with this reward (see --by) or more.")] = None,
    at_most: Annotated[float | None, typer.Option(help="Only with this reward (see --by) or less.")] = None,
    by: Annotated[
        str, typer.Option(metavar="COLUMN", help="The column that --at-least and --at-most look at.")
    ] = "reward",
    finish: Annotated[
        Literal["stop", "length"] | None,
        typer.Option(help="Only responses that ended by themselves (stop), or were cut (length)."),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Sort by this column, smallest first; else as sampled."),
    ] = None,
    descending: Annotated[bool, typer.Option(help="With --sort: the largest value comes first.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Print at most this many responses.")] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line, with the numbers of every token.")
    ] = False,
) -> None:
    """Show the responses of a run with their rewards; run.keep_rollouts says of how many steps a run keeps them."""
    from rto_megatron.errors import RecipeError
    from rto_megatron.reporting.rollout_query import RolloutQuery, find_rollouts, json_lines, shown
    from rto_megatron.reporting.samples import show

    if descending and sort is None:
        raise RecipeError("--descending has no effect without --sort; name a column, such as --sort reward")
    query = RolloutQuery(
        steps=tuple(step or ()),
        prompt_ids=tuple(prompt or ()),
        least=at_least,
        most=at_most,
        by=by,
        finish_reason=finish,
        sort=sort,
        is_descending=descending,
    )
    found = find_rollouts(run_dir, query)
    if as_json:
        for line in json_lines(found, limit):
            typer.echo(line)
    else:
        show(shown(found, limit, f"{run_dir}: {min(limit, found.num_rows)} of {found.num_rows} rollouts"))
