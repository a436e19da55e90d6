"""`rto train` and `rto export`."""

from pathlib import Path
from typing import Annotated

import typer

from rto_megatron.cli.options import Overrides, Recipe
from rto_megatron.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(train)
    app.command()(export)


def train(recipe: Recipe, overrides: Overrides = None) -> None:
    """Run one stage (sft, reward_model, dpo, ppo, rto, evaluate) as one rank; `rto launch` starts all ranks.

    Start it under torchrun or SLURM for more than one rank. A run folder that holds checkpoints is resumed.
    """
    from rto_megatron.config.checks import require_pool
    from rto_megatron.config.load import load_recipe

    config = load_recipe(recipe, overrides or [])
    require_pool(config)
    # Loads Megatron, which takes seconds; a mistake in the recipe has been reported before.
    from rto_megatron.trainer.stages import run_stage

    run_stage(config)


def export(
    run_dir: Annotated[Path, typer.Argument(help="Run folder with a checkpoint.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="New folder to write.", show_default=False)],
) -> None:
    """Write a run's last checkpoint as a Hugging Face folder that transformers and vLLM load."""
    from rto_megatron.trainer.stages import export_run

    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; name a new folder, an export never overwrites one")
    export_run(run_dir, folder)
