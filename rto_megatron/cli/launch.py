"""`rto launch`: all processes of one stage on this machine, its ranks and, where it samples, its pool."""

import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from rto_megatron.cli.options import Overrides, Recipe
from rto_megatron.errors import UserError
from rto_megatron.reporting.progress import plain

if TYPE_CHECKING:
    from rto_megatron.config.schema import Stage
    from rto_megatron.launching.attempts import Stopping
    from rto_megatron.launching.launched_pool import PoolChoice
    from rto_megatron.lifecycle.status import Status


Ranks = Annotated[
    int | None,
    typer.Option(
        min=1, help="Trainer processes; default: all GPUs that the pool leaves, or tensor x pipeline."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(launch)


def launch(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Ranks = None,
    pool_gpus: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs of the pool; default: half of them, or what its servers take."),
    ] = None,
    pool_servers: Annotated[
        int | None,
        typer.Option(min=1, help="Servers of the pool; default: as many as its GPUs hold, one on a CPU."),
    ] = None,
    pool_tensor: Annotated[
        str,
        typer.Option(help="Tensor-parallel size of the pool's servers; one for all, or one each, as in 1,2."),
    ] = "1",
    restarts: Annotated[
        int,
        typer.Option(min=0, help="Fresh starts after a crash, in a row without a new checkpoint."),
    ] = 3,
) -> None:
    """Run one stage on this machine: start a pool if it samples and names none, start its ranks, stop all.

    The ranks start as by `torchrun --standalone --nproc-per-node N -m rto_megatron.cli.main train RECIPE`, at once:
    they import and load while the servers start, and wait for them before the first weight push. A server of the pool
    that ends is started again, up to five times in a row, and serves from the next weight push on. With
    rollout.colocated=true the pool lives on the ranks' own GPUs and is ready before they start.

    SIGTERM, SIGUSR1 or a file named STOP in the run folder: the step is finished and saved, then the run ends (status
    85). Ctrl-C ends it at once (130). run_status.json in the run folder says why a run ended.
    """
    from rto_megatron.platform.collector import resting

    with resting():
        from rto_megatron.config.load import load_recipe
        from rto_megatron.config.reward_code import rewards_of, running_code
        from rto_megatron.launching.launched_pool import PoolChoice
        from rto_megatron.launching.torchrun import refuse_several_machines
        from rto_megatron.lifecycle.run_lock import LAUNCH_VARIABLE, held
        from rto_megatron.lifecycle.status import ExitReason

    config = load_recipe(recipe, overrides or [])
    if unused := refuse_several_machines(str(recipe)):
        typer.echo(f"{', '.join(unused)}: not used, as the options of `rto launch` say how it calls torchrun")
    for line in running_code(rewards_of(config)):
        typer.echo(plain(line))
    _warn_of_slow(config.precision.dtype)
    choice = PoolChoice(pool_gpus, pool_servers, pool_tensor)
    if _says_finished(config):
        return
    arguments = ["train", str(recipe), *(overrides or [])]
    with held(config.run.dir) as owner:
        os.environ[LAUNCH_VARIABLE] = owner
        status = _told(config, arguments, ranks, choice, restarts)
    if status.reason is ExitReason.CONFIG:
        raise UserError(status.message)
    if status.reason is not ExitReason.DONE:
        typer.echo(f"{status.reason} after step {status.step}: {plain(status.message)}", err=True)
    raise typer.Exit(status.reason.exit_code)


def _says_finished(config: "Stage") -> bool:
    from rto_megatron.config.schema import TrainStage
    from rto_megatron.trainer.finished import is_finished

    if not isinstance(config, TrainStage) or not is_finished(config):
        return False
    typer.echo(
        f"{config.run.dir} has all of its {config.run.steps} steps, and its model is in {config.run.dir / 'hf'}; "
        "raise run.steps to go on, or name another run.dir to start again"
    )
    return True


def _told(
    config: "Stage", arguments: list[str], ranks: int | None, choice: "PoolChoice", restarts: int
) -> "Status":
    """Runs the stage; run_status.json says how it ended, whoever ended it."""
    from rto_megatron.launching.attempts import listening
    from rto_megatron.lifecycle.ending import finished_steps
    from rto_megatron.lifecycle.status import ExitReason, Status, write_status

    run_dir = config.run.dir
    try:
        with listening(run_dir) as stopping, ExitStack() as stack:
            return _run(config, arguments, ranks, choice, restarts, stopping, stack)
    except UserError as error:
        write_status(run_dir, Status(ExitReason(error.reason), finished_steps(run_dir), str(error)))
        raise
    except KeyboardInterrupt:
        status = Status(ExitReason.INTERRUPTED, finished_steps(run_dir), "stopped at once by a signal")
        write_status(run_dir, status)
        return status


def _run(
    config: "Stage",
    arguments: list[str],
    ranks: int | None,
    choice: "PoolChoice",
    restarts: int,
    stopping: "Stopping",
    stack: ExitStack,
) -> "Status":
    """Starts the pool on `stack` if one is needed, then the ranks, as often as it takes."""
    import torch

    from rto_megatron.config.facts import facts_of
    from rto_megatron.config.plan import most_ranks
    from rto_megatron.engine.source import find_sources
    from rto_megatron.launching.attempts import run_attempts
    from rto_megatron.launching.launched_pool import launched_pool, plan_pool
    from rto_megatron.launching.torchrun import start_ranks
    from rto_megatron.lifecycle.start_up import begin_launch

    begin_launch()
    find_sources(config)  # a model that is not there is told before a pool or a rank is started
    gpus = torch.cuda.device_count()
    free_gpus = gpus
    pool = None
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the pool's servers inherit it
    sampling = facts_of(config).sampling
    _stay_on_loopback(sampling.rollout.servers if sampling else ())
    own_pool = plan_pool(sampling, gpus, ranks, choice) if sampling and not sampling.rollout.servers else None
    if gpus == 0:
        _share_cores((ranks or most_ranks(config.parallel, 0)) + (sum(own_pool[0]) if own_pool else 0))
    if sampling and own_pool:
        sizes, devices = own_pool
        pool = stack.enter_context(launched_pool(sampling, sizes, devices))
        arguments = [*arguments, *pool.arguments]
        if not sampling.rollout.colocated:
            free_gpus -= len(devices)
        pool.require_before_ranks()
    start = partial(start_ranks, ranks or most_ranks(config.parallel, free_gpus), arguments)
    if pool is None:
        return run_attempts(config.run.dir, restarts, stopping, _without_pool, start)
    return run_attempts(config.run.dir, restarts, stopping, pool.prepare, partial(pool.beside, start))


def _stay_on_loopback(servers: tuple[str, ...]) -> None:
    """Keeps gloo and NCCL from listening on the machine's networks, unless a server is elsewhere."""
    from rto_megatron.platform.network import host_of, is_loopback

    if all(is_loopback(host_of(server)) for server in servers):
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")


def _warn_of_slow(dtype: str) -> None:
    import torch

    from rto_megatron.platform.cpu_products import multiplies_bf16, slow_dtype

    said = None if torch.cuda.is_available() else slow_dtype(dtype, multiplies_bf16())
    if said is not None:
        typer.echo(f"warning: {said}", err=True)


def _share_cores(num_processes: int) -> None:
    from rto_megatron.platform.threads import sleep_while_waiting

    said = sleep_while_waiting(num_processes, len(os.sched_getaffinity(0)), os.environ)
    if said is not None:
        typer.echo(said)


def _without_pool(attempt: int) -> bool:
    return True
