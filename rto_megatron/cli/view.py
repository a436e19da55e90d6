"""`rto view`: one HTML file with a run, or two side by side."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(view)


def view(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    other: Annotated[
        Path | None, typer.Argument(metavar="[RUN2]", help="Another, shown beside it.", show_default=False)
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Where the page is written; it replaces what is there.")
    ] = Path("view.html"),
    step: Annotated[
        list[int] | None, typer.Option(help="Only rollouts of this step; may be given several times.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Only responses to the prompt with this id; several may be given."),
    ] = None,
) -> None:
    """Write one page with curves, responses and the credit of every token; it opens in a browser without a network."""
    from rto_megatron.errors import RecipeError
    from rto_megatron.reporting.run_page import write_page

    if not out.parent.is_dir():
        raise RecipeError(f"--out {out}: there is no folder {out.parent}; make it, or name another file")
    if out.is_dir():
        raise RecipeError(f"--out {out} is a folder; expected the name of a file to write")
    runs = write_page([run_dir, *([other] if other else [])], out, step or (), prompt or ())
    for run in runs:
        typer.echo(f"{run.name}: {len(run.curves)} curves. {run.note}")
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.2f} MB; open it in a browser")
