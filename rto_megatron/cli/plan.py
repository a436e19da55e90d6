"""`rto plan`: the layouts of a recipe that are worth starting on some GPUs, with what they take and how long."""

import os
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from rto_megatron.cli.options import Assume, Overrides, Recipe
from rto_megatron.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rto_megatron.config.schema import Stage
    from rto_megatron.planning.candidates import Candidate
    from rto_megatron.planning.gpus import Gpu
    from rto_megatron.planning.whole_step import Lengths

_SHOWN = 3
_MOST_SIMULATED = 8


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(plan)


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the job.")] = 8,
    gpu: Annotated[
        str, typer.Option(help="Their kind, as in h100, or GiB:TFLOP/s:GB/s, as in 96:148:4000.")
    ] = "h100",
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean tokens of a prompt; default: the longest, of a pair half.")
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean tokens of a response; default: the longest.")
    ] = None,
    simulated: Annotated[
        bool,
        typer.Option(help="Take memory from a simulated step of each layout, not from the formulas alone."),
    ] = True,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a machine.")] = 8,
    assume: Assume = None,
) -> None:
    """Find the fastest layouts of a recipe that fit: memory by simulation, seconds by phase, commands to start them.

    Layouts are pruned by the closed formulas of `rto check`, ranked by seconds from fixed constants
    (docs/planning.md), and then simulated at their real size until three of them fit. Needs no GPU and no model.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is fake lies nowhere, and torch must not look for a GPU
    from rto_megatron.planning.candidates import Search, fitting
    from rto_megatron.planning.gpus import gpu_for
    from rto_megatron.planning.judgement import known_models, require_step
    from rto_megatron.planning.memory import trained_bytes
    from rto_megatron.planning.reasons import best, reasons
    from rto_megatron.planning.ways_out import refuse_nothing_fits

    given = list(overrides or [])
    config = _loaded(recipe, given, ())
    kind = gpu_for(gpu, config.precision)
    roles, known = known_models(config, assume or [])
    require_step(config, roles, known)

    def found_on(number: int, card: "Gpu", more: "Sequence[str]") -> "list[Candidate]":
        held = {key.partition("=")[0] for key in (*given, *more)}
        load = partial(_loaded, recipe, [*given, *more])
        return Search(load, number, card, assume or [], held, lengths, gpus_per_node).candidates()

    lengths = _lengths(recipe, given, prompt_tokens, response_tokens)
    found = found_on(gpus, kind, ())
    chosen = fitting(found, kind)
    if not chosen:
        refuse_nothing_fits(found, found_on, gpus, kind, trained_bytes(config, known))
    shown = best(chosen, _MOST_SIMULATED if simulated else _SHOWN)
    sized = _simulated(shown, kind) if simulated else [(one, one.num_bytes) for one in shown]
    console = Console() if Console().is_terminal else Console(width=140)
    tried = f"{len(found)} sound layouts were tried, {len(chosen)} fit by the formulas"
    console.print(tried, highlight=False)
    for number, (one, num_bytes) in enumerate(sorted(sized, key=lambda each: chosen.index(each[0])), 1):
        _print(console, number, one, num_bytes, kind, simulated)
        lines = [f"- {reason}" for reason in reasons(one, found, kind)]
        for line in (*lines, _command(recipe, given, one, gpus, gpus_per_node)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _loaded(recipe: Path, given: list[str], own: "Sequence[str]") -> "Stage":
    from rto_megatron.config.load import load_recipe

    return load_recipe(recipe, [*given, *own])


def _lengths(
    recipe: Path, overrides: list[str], prompt_tokens: int | None, response_tokens: int | None
) -> "Lengths | None":
    """What the user says; what is left out is the longest that the recipe admits.

    Raises:
        RecipeError: it is longer than that.
    """
    from rto_megatron.config.checks import refuse
    from rto_megatron.config.load import load_recipe
    from rto_megatron.config.plan import fewest_ranks, plan_stage
    from rto_megatron.planning.whole_step import Lengths, longest_lengths

    if prompt_tokens is None and response_tokens is None:
        return None
    config = load_recipe(recipe, overrides)
    plan = plan_stage(config, fewest_ranks(config.parallel))
    longest = longest_lengths(plan)
    lengths = Lengths(prompt_tokens or longest.prompt, response_tokens or longest.response)
    parts = [
        (f"--prompt-tokens {lengths.prompt}", lengths.prompt, longest.prompt, "data.max_prompt_tokens"),
        (
            f"--response-tokens {lengths.response}",
            lengths.response,
            longest.response,
            "sampling.max_response_tokens",
        ),
    ]
    if plan.facts.online is None:  # a pair has one limit for both
        name = f"--prompt-tokens {lengths.prompt} --response-tokens {lengths.response}"
        parts = [(name, lengths.both, *plan.facts.longest_sequence)]
    refuse(f"{name}: expected at most {most}, {key}" for name, found, most, key in parts if found > most)
    return lengths


def _simulated(chosen: "Sequence[Candidate]", gpu: "Gpu") -> "list[tuple[Candidate, int]]":
    """The first that fit when they are simulated, with the bytes of their fullest rank."""
    from rto_megatron.platform.device import prepare

    prepare()
    from rto_megatron.planning.candidates import Candidate, shared_bytes
    from rto_megatron.planning.memory import gib
    from rto_megatron.simulation.whole_job import simulate_job

    sized: list[tuple[Candidate, int]] = []
    for one in chosen:
        num_bytes = max(rank.peak for rank in simulate_job(one.plan, one.shapes))
        if one.plan.facts.is_colocated:
            num_bytes = shared_bytes(one.plan, one.known, gpu, one.pool_tensor, num_bytes)
        sized.append((one, num_bytes))
        best = [each for each in sized if each[1] <= gpu.usable_bytes]
        if len(best) == _SHOWN:
            break
    if not best:
        least = min(num_bytes for _, num_bytes in sized)
        raise RecipeError(
            f"the fastest {len(sized)} layouts that fit a {gpu.name} by the formulas do not when they are simulated: "
            f"the smallest takes {gib(least)}, {gib(least - gpu.usable_bytes)} too much; lower batch.tokens or "
            "batch.micro, set precision.recompute=true, or add GPUs"
        )
    return best


def _print(
    console: Console, number: int, one: "Candidate", num_bytes: int, gpu: "Gpu", is_simulated: bool
) -> None:
    from rto_megatron.planning.memory import gib

    how = "simulated" if is_simulated else "by the formulas"
    title = (
        f"{number}. {one.time.seconds:,.1f} s a step, {gib(num_bytes)} of {gib(gpu.usable_bytes)} on the fullest "
        f"GPU ({how}), MFU of the trainer over the whole step {one.time.utilisation:.0%}"
    )
    table = Table("phase", title=title)
    for name in ("seconds", "limit", "limit / seconds"):
        table.add_column(name, justify="right")
    for phase in one.time.phases:
        table.add_row(
            phase.name,
            f"{phase.seconds:,.1f}",
            f"{phase.limit_s:,.1f}",
            f"{phase.limit_s / phase.seconds:.0%}",
        )
    table.add_section()
    table.add_row(
        "step, with what it takes beside",
        f"{one.time.seconds:,.1f}",
        f"{one.time.limit_s:,.1f}",
        f"{one.time.limit_s / one.time.seconds:.0%}",
    )
    console.print(table)
    forwards = f"{one.time.update_forwards:.2f}"
    console.print(f"the update takes {forwards} forwards of what it trains", highlight=False)


def _command(recipe: Path, given: "Sequence[str]", one: "Candidate", gpus: int, per_node: int) -> str:
    """What starts a layout: on one machine, or as a batch job where machines are whole."""
    keys = [*given, *one.overrides]
    own_pool = 0 < one.pool_gpus < gpus
    servers = ["--pool-tensor", str(one.pool_tensor)] if one.pool_tensor > 1 else []
    if gpus <= per_node:
        pool = ["--pool-gpus", str(one.pool_gpus)] if own_pool else []
        command = ["rto", "launch", str(recipe), *keys, "--ranks", str(one.plan.world_size)]
        return shlex.join([*command, *pool, *servers])
    pool = ["--pool-nodes", str(one.pool_gpus // per_node)] if own_pool else []
    command = ["rto", "slurm", str(recipe), "--nodes", str(-(-gpus // per_node))]
    return shlex.join([*command, "--gpus-per-node", str(per_node), *pool, *servers, *keys])
