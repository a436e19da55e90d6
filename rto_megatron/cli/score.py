"""`rto score`: win rates from judgments of AlpacaEval and Arena-Hard."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rto_megatron.platform.whole_files import write_whole


def register(app: typer.Typer) -> None:
    """Add the command of this file to `app`."""
    app.command()(score)


def score(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="annotations.json, model_judgment/JUDGE/*.jsonl, or folders that hold them; official ones too.",
            show_default=False,
        ),
    ],
    gamed: Annotated[
        Path | None,
        typer.Option(
            help="AlpacaEval's df_gamed.csv, for the length-controlled win rate; needs --reference."
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Outputs of AlpacaEval's baseline, whose order of instructions df_gamed.csv follows."
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="Folder with Arena-Hard's model_answer/*.jsonl of all models and of the baseline: style control."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Arena-Hard's baseline, where a file does not name it; default: the official one."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=10, help="Rounds of every bootstrap.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the bootstraps.")] = 42,
    as_json: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write all numbers there too; it replaces what is there."
        ),
    ] = None,
) -> None:
    """Show win rates with standard errors and intervals; all judgments of Arena-Hard that are named are one pool.

    The length-controlled rate and style control follow the official code and agree with it on made-up numbers; on
    official data they were never run.
    """
    from rto_megatron.benchmarks.scored_files import ScoreOptions, score_files, tables
    from rto_megatron.reporting.samples import show

    scores = score_files(paths, ScoreOptions(gamed, reference, answers, baseline, rounds, seed))
    for table in tables(scores):
        show(table)
    if as_json is not None:
        write_whole(as_json, json.dumps(scores.as_json(), indent=2) + "\n")
