"""`rto train`, `rto evaluate`, `rto launch` and `rto export`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from rto_megatron.cli.options import Overrides, Recipe
from rto_megatron.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(train)
    app.command()(evaluate)
    app.command()(launch)
    app.command()(export)


def train(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train one stage (sft, reward_model, dpo, ppo, rto), as one rank; `rto launch` starts all ranks.

    Start it under torchrun or SLURM for more than one rank. A run folder that holds checkpoints is resumed.
    """
    from rto_megatron.config.load import load_recipe
    from rto_megatron.trainer.stages import run_stage

    run_stage(load_recipe(recipe, overrides or []))


def evaluate(recipe: Recipe, overrides: Overrides = None) -> None:
    """Sample held-out prompts, score them, measure the KL to the reference; writes evaluation.json in the run folder.

    The recipe's stage must be `evaluate`. Start it under torchrun for more than one rank, as `rto train`.
    """
    from rto_megatron.config.load import load_recipe
    from rto_megatron.trainer.stages import run_stage

    config = load_recipe(recipe, overrides or [])
    if config.stage != "evaluate":
        raise UserError(
            f"{recipe}: found stage {config.stage}; `rto evaluate` needs a recipe whose stage is evaluate"
        )
    run_stage(config)


def launch(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on this machine; default: parallel.tensor x parallel.pipeline."),
    ] = None,
) -> None:
    """Start the ranks of one stage on this machine with torchrun and wait for them.

    The same as `torchrun --standalone --nproc-per-node RANKS -m rto_megatron.cli.main train RECIPE ...`,
    without torchrun's own traceback when a rank fails. The pool of a stage that samples must run already
    (`rto pool`); launchers/local.sh starts both.
    """
    from rto_megatron.cli.torchrun import run_ranks
    from rto_megatron.config.load import load_recipe

    config = load_recipe(recipe, overrides or [])
    num_ranks = ranks or config.parallel.tensor * config.parallel.pipeline
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_ranks(num_ranks, ["train", str(recipe), *(overrides or [])])


def export(
    run_dir: Annotated[Path, typer.Argument(help="Run folder with a checkpoint.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="New folder to write.", show_default=False)],
) -> None:
    """Write a run's last checkpoint as a Hugging Face folder that transformers and vLLM load."""
    from rto_megatron.trainer.stages import export_run

    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; name a new folder, an export never overwrites one")
    export_run(run_dir, folder)
