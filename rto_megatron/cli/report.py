"""`rto report`: the evaluations of a run folder beside each other."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(report)


def report(
    run_dir: Annotated[
        Path, typer.Argument(help="Folder whose sub-folders hold evaluation.json.", show_default=False)
    ],
) -> None:
    """Show the final table: true return, reward-model score, KL to the reference and length."""
    from rto_megatron.reporting.evaluation import final_table, read_evaluations, verdict
    from rto_megatron.reporting.samples import show

    evaluations = read_evaluations(run_dir)
    show(final_table(evaluations, title=f"{run_dir}: mean ± standard error over held-out prompts"))
    typer.echo(verdict(evaluations))
