"""`rto simulate`: the recipe's own program at its real size, one step of each kind of rank, without its GPUs."""

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from rto_megatron.cli.options import Assume, GpuKind, Overrides, Recipe
from rto_megatron.errors import RecipeError

if TYPE_CHECKING:
    from rto_megatron.planning.gpus import Gpu
    from rto_megatron.simulation.outcome import SimulatedRank

_SHOWN = 6  # collectives, and places that read the device, of a phase


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(simulate)


def simulate(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the job.")] = 8,
    pool_gpus: Annotated[
        int | None,
        typer.Option(
            min=0, help="How many of them the inference pool gets; default: half if the stage samples."
        ),
    ] = None,
    gpu: GpuKind = None,
    assume: Assume = None,
) -> None:
    """Take one step of a recipe at its real size, without numbers: memory of each phase, operations, collectives.

    Builds the recipe's models, engine and optimizer as one rank of each kind has them, and steps them on tensors that
    have shapes and no data. Needs no GPU and no model, and no memory beyond the process's own.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is fake lies nowhere, and torch must not look for a GPU
    from rto_megatron.cli.check import split_gpus
    from rto_megatron.config.load import load_recipe
    from rto_megatron.planning.gpus import gpu_for
    from rto_megatron.planning.judgement import judged, require_step
    from rto_megatron.platform.device import prepare

    config = load_recipe(recipe, overrides or [])
    judge = None if gpu is None else gpu_for(gpu, config.precision)
    world_size, pool_size = split_gpus(config, gpus, pool_gpus)
    plan, shapes = judged(config, world_size, assume or [], f"of {gpus} GPUs the pool has {pool_size}")
    require_step(config, plan.roles, shapes)
    prepare()
    from rto_megatron.simulation.whole_job import simulate_job

    ranks = simulate_job(plan, {name: found.shape for name, found in shapes.items()})
    console = Console() if Console().is_terminal else Console(width=140)
    for rank in ranks:
        _print_rank(console, rank)
    fullest = max(ranks, key=lambda one: one.peak)
    console.print(_verdict(fullest, judge), highlight=False)


def _print_rank(console: Console, rank: "SimulatedRank") -> None:
    from rto_megatron.planning.memory import gib

    held = Table("role", "stage", title=f"rank {rank.rank} holds")
    for name in ("parameters", "weights", "gradients", "optimizer"):
        held.add_column(name, justify="right")
    for role in rank.roles:
        sizes = [role.parts.get(part) for part in (role.name, "gradients", "optimizer")]
        held.add_row(
            role.name,
            str(role.stage),
            f"{role.num_parameters / 1e6:,.1f} M",
            *("" if size is None else gib(size) for size in sizes),
        )
    console.print(held)
    table = Table("phase", title=f"rank {rank.rank}, {rank.num_sequences} of the longest sequences a replica")
    for name in ("models", "parked", "beside them", "peak", "TFLOP", "reads of the device"):
        table.add_column(name, justify="right")
    table.add_column("collectives")
    for phase in rank.phases:
        moved = [
            f"{one.num_calls} {one.collective} over {one.group}, {gib(one.num_bytes)}"
            for one in phase.traffic[:_SHOWN]
        ]
        table.add_row(
            phase.name,
            gib(phase.resident),
            gib(phase.parked) if phase.parked else "",
            gib(phase.working),
            gib(phase.peak),
            f"{phase.flops / 1e12:,.1f}",
            str(sum(one.num_reads for one in phase.reads)),
            "\n".join(moved),
        )
    console.print(table)


def _verdict(fullest: "SimulatedRank", gpu: "Gpu | None") -> str:
    """Raises RecipeError where the fullest rank does not fit."""
    from rto_megatron.planning.memory import gib

    phase = max(fullest.phases, key=lambda one: one.peak)
    said = f"at most {gib(phase.peak)}, on rank {fullest.rank} in phase {phase.name}"
    if gpu is None:
        return f"{said}; name a GPU (--gpu h100) to have it judged."
    if phase.peak > gpu.usable_bytes:
        raise RecipeError(
            f"{said}: {gib(phase.peak - gpu.usable_bytes)} more than the {gib(gpu.usable_bytes)} that a {gpu.name} has "
            "beside what its process takes; raise parallel.tensor or pipeline, set parallel.distributed_optimizer or "
            "precision.recompute, lower batch.tokens, or name parts in offload"
        )
    return f"{said}; a {gpu.name} has {gib(gpu.usable_bytes)} beside what its process takes: it fits."
