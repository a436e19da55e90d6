"""`rto train`: one rank of a stage."""

import os
from pathlib import Path

import typer

from rto_megatron.cli.options import Overrides, Recipe
from rto_megatron.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the command of this file to `app`."""
    app.command()(train)


def train(recipe: Recipe, overrides: Overrides = None) -> None:
    """Run one stage (sft, reward_model, dpo, ppo, rto, evaluate) as one rank; `rto launch` starts all ranks.

    Start it under torchrun or SLURM for more than one rank. A run folder that holds checkpoints is resumed. SIGTERM,
    SIGUSR1 or a file named STOP in it make the run save after its step and end.
    """
    from rto_megatron.lifecycle.stopping import Preempted, die_with_parent, status_of_stopped_rank
    from rto_megatron.platform.collector import resting
    from rto_megatron.platform.open_files import raise_file_limit

    die_with_parent()
    raise_file_limit()
    with resting():
        from rto_megatron.config.checks import require_pool
        from rto_megatron.config.load import load_recipe
        from rto_megatron.lifecycle.ending import RankEnding
        from rto_megatron.lifecycle.run_lock import held_by_rank
        from rto_megatron.lifecycle.starting import ends_while_starting
        from rto_megatron.lifecycle.status import ExitReason
        from rto_megatron.trainer.stages import run_stage

    # Before Megatron is imported, which takes seconds.
    config = load_recipe(recipe, overrides or [])
    require_pool(config)

    try:
        with held_by_rank(config.run.dir), RankEnding(config.run.dir), ends_while_starting(config.run.dir):
            run_stage(config)
    except Preempted:
        if status_of_stopped_rank():
            raise
        raise typer.Exit(0) from None  # run_status.json tells it from a run that is done
    except UserError as error:
        if not is_told_by_launch(config.run.dir, error):
            raise
        raise typer.Exit(ExitReason(error.reason).exit_code) from None


def is_told_by_launch(run_dir: Path, error: UserError) -> bool:
    """Whether `rto launch` will say it: it prints what the run's status says, which is what a rank told first."""
    from rto_megatron.lifecycle.run_lock import LAUNCH_VARIABLE
    from rto_megatron.lifecycle.status import read_status

    status = read_status(run_dir)
    return LAUNCH_VARIABLE in os.environ and status is not None and status.message == str(error)
