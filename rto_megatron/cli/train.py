"""`rto train`, `rto evaluate` and `rto export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rto_megatron.cli.options import Overrides, Recipe
from rto_megatron.errors import UserError

if TYPE_CHECKING:
    from rto_megatron.config.schema import Stage


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(train)
    app.command()(evaluate)
    app.command()(export)


def train(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train one stage (sft, reward_model, dpo, ppo, rto), as one rank; `rto launch` starts all ranks.

    Start it under torchrun or SLURM for more than one rank. A run folder that holds checkpoints is resumed.
    """
    from rto_megatron.config.load import load_recipe

    _run(load_recipe(recipe, overrides or []))


def evaluate(recipe: Recipe, overrides: Overrides = None) -> None:
    """Sample held-out prompts, score them and measure the KL to the reference; leaves evaluation.json.

    The recipe's stage must be `evaluate`. Start it under torchrun for more than one rank, as `rto train`.
    """
    from rto_megatron.config.load import load_recipe

    config = load_recipe(recipe, overrides or [])
    if config.stage != "evaluate":
        raise UserError(f"{recipe}: found stage {config.stage}; `rto evaluate` needs the stage evaluate")
    _run(config)


def _run(config: "Stage") -> None:
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
