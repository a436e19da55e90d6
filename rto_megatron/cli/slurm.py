"""`rto slurm`: a stage as one SLURM job, its trainer on some nodes and its pool on the others."""

import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rto_megatron.cli.options import Assume, Overrides, Recipe
from rto_megatron.errors import MachineError
from rto_megatron.reporting.progress import plain

if TYPE_CHECKING:
    from rto_megatron.launching.slurm_job import Job

_Nodes = Annotated[int, typer.Option(min=1, help="Nodes of the job, those of the pool included.")]
_PoolNodes = Annotated[int, typer.Option(min=0, help="How many of them the inference pool gets.")]
_Gpus = Annotated[
    int | None,
    typer.Option(min=0, help="GPUs of a node; default: those that --gres names, else none: all on the CPUs."),
]
_Gres = Annotated[
    str | None,
    typer.Option(
        help="Generic resources of a node, as in gpu:h100:8,nvme:1; names the GPUs instead of --gpus-per-node."
    ),
]
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
_Partition = Annotated[str | None, typer.Option(help="Partition of the job; default: the site's.")]
_Account = Annotated[str | None, typer.Option(help="Account that pays for the job.")]
_Submit = Annotated[bool, typer.Option("--submit", help="Submit the script, if SLURM can run it.")]
_Qos = Annotated[str | None, typer.Option(help="Quality of service of the job; default: the site's.")]
_Constraint = Annotated[str | None, typer.Option(help="Features that the nodes must have, as in 'h100&ib'.")]
_Exclusive = Annotated[
    bool, typer.Option(help="Whether the nodes run no other job; shared ones need --cpus-per-task.")
]
_Cpus = Annotated[int | None, typer.Option(min=1, help="CPUs of each node, where it is shared.")]
_Memory = Annotated[
    str | None,
    typer.Option(
        "--mem", help="Memory of each node, as in 500G; default: all, on a shared node the site's default."
    ),
]
_Preamble = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Bash that every node runs before a step: modules, exports, folders."),
]
_Container = Annotated[
    str | None, typer.Option(metavar="IMAGE", help="Run the steps in this image, through the pyxis plugin.")
]
_Apptainer = Annotated[
    str | None, typer.Option(metavar="IMAGE", help="Run the steps in this image, through Apptainer.")
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
    gpus_per_node: _Gpus = None,
    gres: _Gres = None,
    pool_tensor: _PoolTensor = 1,
    gpu_gib: _GpuGib = None,
    assume: Assume = None,
    interface: _Interface = "",
    time: _Time = None,
    notice: _Notice = 300,
    partition: _Partition = None,
    account: _Account = None,
    qos: _Qos = None,
    constraint: _Constraint = None,
    exclusive: _Exclusive = True,
    cpus_per_task: _Cpus = None,
    memory: _Memory = None,
    restarts: _Restarts = 3,
    preamble: _Preamble = None,
    container: _Container = None,
    apptainer: _Apptainer = None,
    mount: _Mount = None,
    submit: _Submit = False,
) -> None:
    """Write RUN_DIR/slurm/job.sbatch, a whole job with everything resolved, after checking it as `rto check` does.

    The first nodes train, the last ones serve. The run folder and this checkout must be on a file system that
    all nodes share. Before its time is up the trainer saves, and the job queues itself again and goes on.
    """
    from rto_megatron.config.load import load_recipe
    from rto_megatron.launching.slurm_allocation import Allocation
    from rto_megatron.launching.slurm_job import plan_job

    allocation = Allocation(
        nodes=nodes,
        pool_nodes=pool_nodes,
        gpus_per_node=gpus_per_node,
        interface=interface,
        time=time,
        notice_s=notice,
        partition=partition,
        account=account,
        container=container,
        mounts=tuple(mount or ()),
        gres=gres,
        qos=qos,
        constraint=constraint,
        apptainer=apptainer,
        is_exclusive=exclusive,
        cpus_per_task=cpus_per_task,
        memory=memory,
        preamble=preamble,
    )
    config = load_recipe(recipe, overrides or [])
    _hand_out(plan_job(config, allocation, pool_tensor, restarts, assume or [], gpu_gib), submit)


def _hand_out(job: "Job", submit: bool) -> None:
    """Writes the job's script, and submits it or says how."""
    from rto_megatron.config.reward_code import rewards_of, running_code

    for line in running_code(rewards_of(job.config)):
        typer.echo(plain(line))
    script = job.write()
    nodes = job.allocation.trainer_nodes
    typer.echo(f"{script}: {nodes} nodes x {job.ranks_per_node} trainer ranks, {job.num_servers} servers")
    if not submit:
        typer.echo(f"submit it with: sbatch {shlex.quote(str(script))}")
        return
    _sbatch("--test-only", str(script))
    number = _sbatch("--parsable", str(script)).split(";")[0].strip()
    typer.echo(f"submitted as job {number}; its log is {job.log(number)}")


def _sbatch(*arguments: str) -> str:
    """What sbatch prints.

    Raises:
        MachineError: there is no sbatch, or it refuses the script.
    """
    try:
        done = subprocess.run(["sbatch", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise MachineError(
            "no sbatch on this machine; submit the script from a login node of the cluster"
        ) from error
    if done.returncode:
        raise MachineError(f"sbatch {' '.join(arguments)} refused: {done.stderr.strip()}")
    return done.stdout
