"""`rto slurm`: a stage as one SLURM job, its trainer on some nodes and its pool on the others."""

import subprocess
from typing import Annotated

import typer

from rto_megatron.cli.options import Assume, Overrides, Recipe
from rto_megatron.errors import UserError

_Nodes = Annotated[int, typer.Option(min=1, help="Nodes of the job, those of the pool included.")]
_PoolNodes = Annotated[int, typer.Option(min=0, help="How many of them the inference pool gets.")]
_Gpus = Annotated[int, typer.Option(min=0, help="GPUs of a node; 0: everything on the nodes' CPUs.")]
_PoolTensor = Annotated[int, typer.Option(min=1, help="Tensor-parallel size of the pool's servers.")]
_GpuGib = Annotated[
    float | None, typer.Option(min=1, help="Memory of one GPU: refuse a job whose models do not fit.")
]
_Interface = Annotated[
    str, typer.Option(help="Network interface of every node, as in ib0; default: that of the default route.")
]
_Time = Annotated[str | None, typer.Option(help="Limit, as in 24:00:00; default: the partition's.")]
_Notice = Annotated[
    int,
    typer.Option(
        min=1, help="Seconds before the limit at which the trainer is told to save: more than a step takes."
    ),
]
_Restarts = Annotated[
    int,
    typer.Option(min=0, help="Fresh starts inside the job after a crash, in a row without a new checkpoint."),
]
_Container = Annotated[
    str | None, typer.Option(metavar="IMAGE", help="Run the steps in this image, through the pyxis plugin.")
]
_Mount = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIR", help="Folder to show in the container, beside the checkout and the run folder."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(slurm)


def slurm(
    recipe: Recipe,
    nodes: _Nodes,
    overrides: Overrides = None,
    pool_nodes: _PoolNodes = 0,
    gpus_per_node: _Gpus = 0,
    pool_tensor: _PoolTensor = 1,
    gpu_gib: _GpuGib = None,
    assume: Assume = None,
    interface: _Interface = "",
    time: _Time = None,
    notice: _Notice = 300,
    partition: Annotated[str | None, typer.Option(help="Partition of the job; default: the site's.")] = None,
    account: Annotated[str | None, typer.Option(help="Account that pays for the job.")] = None,
    restarts: _Restarts = 3,
    container: _Container = None,
    mount: _Mount = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the script, if SLURM can run it.")] = False,
) -> None:
    """Write RUN_DIR/slurm/job.sbatch, a whole job with everything resolved, after checking it as `rto check` does.

    The first nodes train, the last ones serve. The run folder and this checkout must be on a file system that
    all nodes share. Before its time is up the trainer saves, and the job queues itself again and goes on.
    """
    from rto_megatron.cli.slurm_job import Allocation, plan_job
    from rto_megatron.config.load import load_recipe

    allocation = Allocation(
        nodes,
        pool_nodes,
        gpus_per_node,
        interface,
        time,
        notice,
        partition,
        account,
        container,
        tuple(mount or ()),
    )
    job = plan_job(
        load_recipe(recipe, overrides or []), allocation, pool_tensor, restarts, assume or [], gpu_gib
    )
    script = job.write()
    typer.echo(
        f"{script}: {nodes - pool_nodes} nodes x {job.ranks_per_node} trainer ranks, {job.num_servers} servers"
    )
    if not submit:
        typer.echo(f"submit it with: sbatch {script}")
        return
    _sbatch("--test-only", str(script))
    number = _sbatch("--parsable", str(script)).split(";")[0].strip()
    typer.echo(f"submitted as job {number}; its log is {job.log(number)}")


def _sbatch(*arguments: str) -> str:
    """What sbatch prints.

    Raises:
        UserError: there is no sbatch, or it refuses the script.
    """
    try:
        done = subprocess.run(["sbatch", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            "no sbatch on this machine; submit the script from a login node of the cluster"
        ) from error
    if done.returncode:
        raise UserError(f"sbatch {' '.join(arguments)} refused: {done.stderr.strip()}")
    return done.stdout
