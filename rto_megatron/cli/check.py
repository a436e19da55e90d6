"""`rto check`: what a recipe means on a given number of GPUs, before any model is built."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rto_megatron.cli.options import Assume, GpuKind, Overrides, Recipe
from rto_megatron.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from rto_megatron.config.batch_sizes import TrainBatchConfig
    from rto_megatron.config.plan import BatchPlan, RankLayout, StagePlan
    from rto_megatron.config.rewards import Source
    from rto_megatron.config.roles import Role
    from rto_megatron.config.schema import Stage
    from rto_megatron.planning.gpus import Gpu
    from rto_megatron.planning.local_data import LookedAt
    from rto_megatron.planning.shapes import FoundShape


GpuGib = Annotated[
    float | None,
    typer.Option(min=1, help="Memory of one GPU, to judge whether a colocated pool fits beside the trainer."),
]
PoolTensor = Annotated[int, typer.Option(min=1, help="Tensor-parallel size of a colocated pool's servers.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(check)


def check(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[
        int,
        typer.Option(
            min=0,
            help="GPUs of the job; 0: parallel.tensor x context x pipeline processes on the CPU.",
        ),
    ] = 0,
    pool_gpus: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="How many of them the inference pool gets; default: half if the stage samples.",
        ),
    ] = None,
    gpu_gib: GpuGib = None,
    pool_tensor: PoolTensor = 1,
    gpu: GpuKind = None,
    assume: Assume = None,
) -> None:
    """Check a recipe; show its configuration, layout, batch arithmetic, memory and data. Needs no GPU and no model.

    Data files that are on this machine are read up to their 1000th row.
    """
    from rto_megatron.config.checks import refuse
    from rto_megatron.config.load import dump, load_recipe
    from rto_megatron.config.reward_code import rewards_of
    from rto_megatron.planning.gpus import gpu_for
    from rto_megatron.planning.judgement import judged
    from rto_megatron.planning.local_data import look_at
    from rto_megatron.planning.token_ids import token_warnings

    config = load_recipe(recipe, overrides or [])
    named = None if gpu is None else gpu_for(gpu, config.precision)
    world_size, pool_size = split_gpus(config, gpus, pool_gpus)
    origin = f"of {gpus} GPUs the pool has {pool_size}" if 0 < world_size < gpus else ""
    plan, shapes = judged(config, world_size, assume or [], origin)
    spare = [*token_warnings(config, shapes), *_warnings(config, on_cpu=not gpus)]
    looked = look_at(config)
    refuse(f"{one.key}: {one.found}" for one in looked if one.is_problem)
    console = Console() if Console().is_terminal else Console(width=140)
    console.rule("resolved configuration")
    console.print(dump(config), markup=False, highlight=False)
    console.print(_layout_table(plan, pool_size))
    console.print(_models_table(plan, shapes))
    if named is not None:
        _require_room(plan, shapes, named)
        gpu_gib = named.gib if plan.facts.is_colocated else gpu_gib
    if gpu_gib is not None:
        _print_phases(console, plan, shapes, gpu_gib, pool_tensor)
    if sources := rewards_of(config):
        console.print(_rewards_table(sources))
    console.print(_data_table(looked))
    for warning in spare:
        console.print(f"warning: {warning}", markup=False, highlight=False)
    console.print(f"{recipe}: {_verdict(_machine(world_size, gpus), gpu, gpu_gib)}.", highlight=False)


def _verdict(machine: str, gpu: str | None, gpu_gib: float | None) -> str:
    """Sound is what was found to have room too."""
    if gpu is not None:
        return f"sound for {machine}, {gpu} each"
    if gpu_gib is not None:
        return f"sound for {machine} of {gpu_gib:g} GiB"
    return (
        f"nothing speaks against its layout, batches and data on {machine}; it is sound where memory is: name a GPU "
        "(--gpu h100), or compare the sum above with what there is"
    )


def _require_room(plan: "StagePlan", shapes: "Mapping[str, FoundShape]", gpu: "Gpu") -> None:
    """Raises RecipeError where a rank of the trainer has no room on a GPU, or nobody knows."""
    from rto_megatron.planning.memory import fullest_bytes, gib

    unknown = [role.name for role in plan.roles if role.name not in shapes]
    if unknown:
        raise RecipeError(
            f"--gpu {gpu.name}: the shapes of {', '.join(unknown)} are not known; name them, as in --assume "
            f"{unknown[0]}=llama-3-8b"
        )
    needed = fullest_bytes(plan, shapes)
    if needed > gpu.usable_bytes:
        raise RecipeError(
            f"the fullest rank takes {gib(needed)}, {gib(needed - gpu.usable_bytes)} more than the "
            f"{gib(gpu.usable_bytes)} that a {gpu.name} has beside what its process takes; rto plan RECIPE --gpus N "
            f"--gpu {gpu.name} finds layouts that fit"
        )


def _warnings(config: "Stage", on_cpu: bool) -> list[str]:
    """What a run could do with, and nobody may have meant."""
    from rto_megatron.config.facts import facts_of
    from rto_megatron.config.kl_gap import drowned_coefficients
    from rto_megatron.config.reward_code import missing_packages, rewards_of
    from rto_megatron.config.stale_updates import stale_updates
    from rto_megatron.planning.shapes import unread_weights
    from rto_megatron.platform.cpu_products import multiplies_bf16, slow_dtype
    from rto_megatron.reporting.loggers import missing_loggers

    training = facts_of(config).training
    missing = [] if training is None else missing_loggers(training.run.loggers)
    slow = slow_dtype(config.precision.dtype, multiplies_bf16()) if on_cpu else None
    here = [*missing, *missing_packages(rewards_of(config)), *([] if slow is None else [slow])]
    here = [f"on this machine, {text}" for text in here]
    return [*here, *unread_weights(config.models), *drowned_coefficients(config), *stale_updates(config)]


def split_gpus(config: "Stage", gpus: int, pool_gpus: int | None) -> tuple[int, int]:
    """Trainer ranks and pool GPUs of a job.

    Raises:
        RecipeError: one of both would have none, or there is no pool to give GPUs to.
    """
    from rto_megatron.config.facts import facts_of
    from rto_megatron.config.plan import fewest_ranks

    facts = facts_of(config)
    if gpus == 0:
        return fewest_ranks(config.parallel), 0
    if facts.is_colocated:
        if pool_gpus is not None:
            raise RecipeError("--pool-gpus has no effect with rollout.colocated=true; remove it")
        return gpus, gpus
    samples = facts.pool is not None
    if pool_gpus and not samples:
        raise RecipeError(
            f"--pool-gpus {pool_gpus} has no effect: stage {config.stage} has no inference pool; remove it"
        )
    pool = pool_gpus if pool_gpus is not None else (gpus // 2 if samples else 0)
    if pool >= gpus or (pool == 0 and samples):
        raise RecipeError(
            f"--gpus {gpus} --pool-gpus {pool}: leaves {max(gpus - pool, 0)} for the trainer and {pool} for "
            f"the pool; stage {config.stage} needs at least one for each"
        )
    return gpus - pool, pool


def _layout_table(plan: "StagePlan", pool_gpus: int) -> Table:
    from rto_megatron.config.learning_rate import known_rates
    from rto_megatron.config.number_rows import number_rows
    from rto_megatron.config.prompts_once import has_shared_prompts, why_prompts_repeat

    facts, layout, batches = plan.facts, plan.layout, plan.batches
    table = Table("", "", title="layout and batch arithmetic", show_header=False)
    if layout.num_ranks == plan.world_size:
        table.add_row("trainer ranks", f"{plan.world_size} = {_cut(layout)}")
    else:
        of_policy = _spans(plan.config.parallel.ranks_of("policy", plan.world_size))
        table.add_row("trainer ranks", str(plan.world_size))
        table.add_row("of them the policy's", f"{_cut(layout)}, ranks {of_policy}")
    for role, grid in plan.config.parallel.roles.items():
        where = "" if grid.ranks is None else f", ranks {grid.ranks}"
        table.add_row(f"of them the {role}'s", _cut(plan.layout_of(role)) + where)
    if facts.pool is not None:
        own = "the trainer's GPUs, in turn" if facts.is_colocated else f"{pool_gpus} GPUs of its own"
        where = own if pool_gpus else "one server on the CPU"
        ahead = 0 if facts.online is None else facts.online.rollout.ahead
        every = "after every step" if ahead < 2 else f"after every {ahead} steps"
        table.add_row("inference pool", f"{where}; receives the policy's weights {every}")
    if (training := facts.training) is not None:
        table.add_row("steps", str(training.run.steps or "one epoch of the data"))
        items = "pairs" if facts.reads_pairs else "sequences"
        table.add_row("optimizer step", _optimizer_step(training.batch, layout.data, batches, items))
        if layout.pipeline > 1 and batches.num_microbatches is not None:
            table.add_row("its pipeline", _idle_time(layout, batches.num_microbatches))
    if (online := facts.online) is not None:
        samples = online.algorithm.samples_per_prompt
        each = "" if samples == 1 else f" x {samples} responses"
        table.add_row(
            "rollout step",
            f"{online.batch.rollout} prompts{each} = {layout.data} x {batches.rollout_per_rank}; "
            f"{batches.updates_per_rollout} optimizer steps per pass",
        )
        if online.rollout.ahead:
            table.add_row(
                "rollouts", f"up to {online.rollout.ahead} steps older than the weights that they train"
            )
    if has_shared_prompts(plan.config):
        why = why_prompts_repeat(plan.config, plan.config.precision.kernels)
        told = "computed once for all its responses in a micro-batch"
        table.add_row("a prompt", told if why is None else f"computed again for each response: {why}")
    for key, told in number_rows(plan.config).items():
        table.add_row(key, told)
    for name, rates in known_rates(training).items() if training is not None else ():
        table.add_row(
            f"{name}.lr",
            f"first {rates.first:.3g}, highest {rates.highest:.3g}, last {rates.last:.3g}; "
            f"{rates.num_updates} optimizer steps, {rates.num_warmup} of warm-up",
        )
    return table


def _cut(layout: "RankLayout") -> str:
    context = f" x context {layout.context}" if layout.context > 1 else ""
    stages = f" in {layout.virtual} chunks" if layout.virtual > 1 else ""
    cut = f"tensor {layout.tensor}{context} x pipeline {layout.pipeline}{stages} x data {layout.data}"
    if (layout.expert, layout.expert_tensor) == (1, None):
        return cut
    return (
        f"{cut}; experts in {layout.expert} parts x {layout.expert_ranks // layout.expert} ranks, "
        f"held {layout.expert_replicas} times"
    )


def _idle_time(layout: "RankLayout", num_microbatches: int) -> str:
    """What stages wait for each other in an optimizer step of equal micro-batches."""
    num_empty = -num_microbatches % layout.pipeline if layout.virtual > 1 else 0
    passes = layout.virtual * (num_microbatches + num_empty)
    empty = f", {num_empty} empty micro-batches filling up their number" if num_empty else ""
    return f"idle for {(layout.pipeline - 1) / (passes + layout.pipeline - 1):.0%} of the time{empty}"


def _layers(role: "Role", found: "FoundShape", layout: "RankLayout") -> str:
    """How many layers each stage has, where a layout says something of it."""
    from rto_megatron.models.pipeline_cut import pipeline_cut

    if role.shares is not None or (layout.stages is None and layout.virtual == 1):
        return ""
    sizes = (layout.pipeline, layout.virtual, layout.stages)
    return (
        f", layers {' + '.join(map(str, pipeline_cut(found.shape, role.has_value_head, *sizes).of_stages))}"
    )


def _optimizer_step(batch: "TrainBatchConfig", replicas: int, plan: "BatchPlan", items: str) -> str:
    if plan.num_microbatches is not None:
        return (
            f"{batch.train} = {replicas} data-parallel ranks x {plan.num_microbatches} micro-batches "
            f"x {batch.micro} {items}"
        )
    return (
        f"{batch.train} {items}, shared by FLOPs over {replicas} data-parallel ranks, in micro-batches of "
        f"{batch.tokens} tokens"
    )


def _models_table(plan: "StagePlan", shapes: "Mapping[str, FoundShape]") -> Table:
    from rto_megatron.planning.memory import gib, role_cost

    sets, title = plan.rank_sets, f"models, each on all {plan.world_size} trainer ranks"
    if len(sets) > 1:
        title = f"models on {plan.world_size} trainer ranks"
    table = Table("role", "model", "shape from", "work", title=title)
    for name in ("parameters", "per rank", "memory per rank"):
        table.add_column(name, justify="right")
    for role in plan.roles:
        work = f"shares {role.shares}" if role.shares else ("trained" if role.is_trained else "frozen")
        kind = "fresh value head" if role.is_head_fresh else "value head"
        head = f" ({kind})" if role.has_value_head else ""
        found = shapes.get(role.name)
        if found is None:
            table.add_row(
                role.name, _short(role.path), "unknown: not on this machine", work + head, "?", "?", "?"
            )
            continue
        cost = role_cost(role, found.shape, plan)
        work += _layers(role, found, plan.layout_of(role.name))
        numbers = (f"{cost.parameters / 1e6:,.1f} M", f"{cost.parameters_per_rank / 1e6:,.1f} M")
        table.add_row(
            role.name, _short(role.path), found.source, work + head, *numbers, gib(cost.bytes_per_rank)
        )
    for ranks, names in sets.items():
        table.add_section()
        _add_sum(table, plan, shapes, names, f" of ranks {_spans(ranks)}" if len(sets) > 1 else "")
    return table


def _add_sum(
    table: Table, plan: "StagePlan", shapes: "Mapping[str, FoundShape]", names: "Collection[str]", where: str
) -> None:
    """Rows with the memory of a rank that holds some roles."""
    from rto_megatron.planning.activation_memory import activation_bytes
    from rto_megatron.planning.memory import gib, model_bytes, role_cost

    activations = activation_bytes(plan, shapes, names)
    table.add_row("activations", "", "", f"largest micro-batch{where}, estimated", "", "", gib(activations))
    known = [role for role in plan.roles if role.name in names and role.name in shapes]
    total = activations + sum(role_cost(one, shapes[one.name].shape, plan).bytes_per_rank for one in known)
    if (training := plan.facts.training) is not None and training.offload:
        away = ", ".join(training.offload)
        spared = total - activations - model_bytes(plan, shapes, names)
        table.add_row(
            "offload", "", "", f"spared while scoring or updating, of {away}", "", "", f"-{gib(spared)}"
        )
        total -= spared
    missing = "" if len(known) == len(names) else "without the unknown models"
    table.add_row(f"sum{where}", "", "", missing, "", "", gib(total))


def _spans(ranks: "Sequence[int]") -> str:
    """Ranks as people write them: 0-3, 8-15."""
    starts = [rank for rank in ranks if rank - 1 not in ranks]
    ends = [rank for rank in ranks if rank + 1 not in ranks]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _rewards_table(sources: "Sequence[Source]") -> Table:
    from rto_megatron.config.rewards import FunctionSource, ServiceSource

    table = Table("", "kind", "weight", "", title="rewards; no code of them was run here")
    for source in sources:
        what = ""
        if isinstance(source, FunctionSource):
            what = f"{source.function} (sha256 {(source.sha256 or '')[:16]}), pays {source.pays}"
        elif isinstance(source, ServiceSource):
            what = f"{source.url}, pays {source.pays}"
        table.add_row(source.name, source.kind, f"{source.weight:g}", Text(what))
    return table


def _data_table(looked: "Sequence[LookedAt]") -> Table:
    table = Table("", "", title="data", show_header=False)
    for one in looked:
        table.add_row(one.key, Text(one.found))
    return table


def _print_phases(
    console: Console,
    plan: "StagePlan",
    shapes: "Mapping[str, FoundShape]",
    gpu_gib: float,
    pool_tensor: int,
) -> None:
    """The memory of trainer and pool in each phase.

    Raises:
        RecipeError: they do not fit, or there is nothing to judge.
    """
    from rto_megatron.config.checks import refuse
    from rto_megatron.planning.colocated_memory import SharedGpu, memory_problems, phase_memory
    from rto_megatron.planning.memory import gib

    pool = plan.facts.pool
    if pool is None or not pool.colocated or pool.gpu_memory_fraction is None:
        raise RecipeError("--gpu-gib judges a pool on the trainer's GPUs; it needs rollout.colocated=true")
    if "policy" not in shapes:
        raise RecipeError("--gpu-gib needs the policy's shape; name it with --assume policy=SHAPE")
    gpu = SharedGpu(int(gpu_gib * 2**30), pool.gpu_memory_fraction, pool_tensor)
    phases = phase_memory(plan, shapes, gpu)
    table = Table("in a GPU's memory", title=f"phases of a step on a GPU of {gpu_gib:g} GiB")
    for phase in phases:
        table.add_column(phase.name, justify="right")
    for part in dict.fromkeys(name for phase in phases for name in phase.parts):
        sizes = [phase.parts.get(part) for phase in phases]
        table.add_row(part, *("" if size is None else gib(size) for size in sizes))
    table.add_section()
    table.add_row("sum", *(gib(phase.total) for phase in phases))
    console.print(table)
    sampling = plan.facts.sampling
    assert sampling is not None
    refuse(memory_problems(sampling, shapes["policy"].shape, phases, gpu))


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _machine(world_size: int, gpus: int) -> str:
    return f"{gpus} GPUs" if gpus else f"{world_size} processes on the CPU"
