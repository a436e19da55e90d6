"""A SLURM job of one stage: how its nodes are used, whether that works, and the sbatch script that says so."""

import csv
import io
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import rto_megatron
from rto_megatron.config.checks import refuse
from rto_megatron.config.facts import facts_of
from rto_megatron.config.load import dump
from rto_megatron.config.plan import StagePlan, fewest_ranks
from rto_megatron.config.run_folder import make_run_folder
from rto_megatron.config.schema import Stage
from rto_megatron.errors import RecipeError
from rto_megatron.launching.slurm_allocation import Allocation, directives, log_pattern, text_problems
from rto_megatron.planning.colocated_memory import pool_weight_bytes
from rto_megatron.planning.judgement import judged
from rto_megatron.planning.memory import fullest_bytes, gib, weight_bytes
from rto_megatron.planning.placement import max_model_len
from rto_megatron.planning.shapes import FoundShape, hugging_face_folder

ROOT = Path(rto_megatron.__file__).parents[1]
_BODY = ROOT / "launchers" / "slurm" / "job.sh"
_POOL_WAIT_S = 1800
# Before all other settings, whose names a preamble may use for its own. With `source ... ||` its set -e had no effect.
_SOURCING = (
    'if [ -n "$preamble" ]; then source "$preamble"; fi',
    '[ $? -eq 0 ] || { echo "error: the last command of $preamble failed" >&2 && exit 1; }',
)


@dataclass(frozen=True)
class Job:
    """A stage on an allocation, checked.

    Args:
        server_nodes: nodes of each server; more than 1 where a server is larger than a node.
        num_servers: of the whole pool; 0: the stage needs none, or the configuration names its servers.
        pool_options: of `rto pool`, equal on all pool nodes.
        restarts: in a row without a new checkpoint.

    Example:
        job.write()
    """

    config: Stage
    allocation: Allocation
    ranks_per_node: int
    server_nodes: int
    num_servers: int
    pool_options: tuple[str, ...]
    restarts: int

    @property
    def folder(self) -> Path:
        """Holds the script, its recipe and its logs."""
        return self.config.run.dir / "slurm"

    def log(self, number: str) -> Path:
        """The file that a submitted job logs to."""
        return self.folder / f"log-{number}.txt"

    def write(self) -> Path:
        """Writes the script and what it reads, recipe and preamble; returns the script's path."""
        make_run_folder(self.config.run.dir)
        self.folder.mkdir(exist_ok=True)
        (self.folder / "recipe.yaml").write_text(dump(self.config))
        if self.allocation.preamble is not None:
            self._preamble.write_text(self.allocation.preamble.read_text())
        script = self.folder / "job.sbatch"
        script.write_text("\n".join([*self._header(), *self._settings(), "", _BODY.read_text()]))
        return script

    @property
    def _preamble(self) -> Path:
        return self.folder / "preamble.sh"

    def _header(self) -> list[str]:
        options = {
            "job-name": self.config.stage,
            **self.allocation.options(),
            "open-mode": "append",
            "output": log_pattern(self.folder),
            "chdir": str(Path.cwd()),
            "requeue": "",
        }
        return ["#!/bin/bash", "# Written by `rto slurm`.", *directives(options)]

    def _settings(self) -> list[str]:
        asked = self.allocation
        settings: dict[str, str | int | Path | tuple[str, ...]] = {
            "preamble": "" if asked.preamble is None else self._preamble,
            "root": ROOT,
            "recipe": self.folder / "recipe.yaml",
            "overrides": (),
            "run_dir": self.config.run.dir,
            "interface": asked.interface,
            "ranks_per_node": self.ranks_per_node,
            "pool_nodes": asked.pool_nodes,
            "server_nodes": self.server_nodes,
            "num_servers": self.num_servers,
            "pool_options": self.pool_options,
            "pool_wait_s": _POOL_WAIT_S,
            "restarts": self.restarts,
            "step_options": self._step_options(),
            "container": self._container(),
        }
        first, *others = [f"{name}={_quoted(value)}" for name, value in settings.items()]
        return [first, *_SOURCING, *others]

    def _step_options(self) -> tuple[str, ...]:
        asked = self.allocation
        gpus = tuple(f"--{name}={value}" for name, value in asked.gpu_options.items())
        if asked.container is None:
            return gpus
        return gpus + pyxis_options(asked.container, shown_folders(self.config, asked))

    def _container(self) -> tuple[str, ...]:
        asked = self.allocation
        if asked.apptainer is None:
            return ()
        return apptainer_command(asked.apptainer, shown_folders(self.config, asked), asked.gpus > 0)


def shown_folders(config: Stage, allocation: Allocation) -> list[Path]:
    """What a container shows of the nodes' file system."""
    folders = [ROOT, config.run.dir, *(Path(folder).absolute() for folder in allocation.mounts)]
    return list(dict.fromkeys(folders))


def _quoted(value: str | int | Path | tuple[str, ...]) -> str:
    return f"({shlex.join(value)})" if isinstance(value, tuple) else shlex.quote(str(value))


def plan_job(
    config: Stage,
    allocation: Allocation,
    pool_tensor: int,
    restarts: int,
    assume: list[str],
    gpu_gib: float | None,
) -> Job:
    """How the stage uses the allocation.

    Args:
        pool_tensor: tensor-parallel size of a server.
        assume: shapes of models that are not here, as ROLE=SHAPE.
        gpu_gib: memory of a GPU; None: not judged.

    Raises:
        UserError: it cannot work.
    """
    problems = [*allocation.problems(), *_folder_problems(config, allocation)]
    if pool_tensor > 1 and allocation.pool_nodes == 0:
        problems.append(f"--pool-tensor {pool_tensor} has no effect without --pool-nodes; remove it")
    refuse(problems)
    _refuse_other_machines(config, allocation)
    ranks_per_node = allocation.gpus or max(1, fewest_ranks(config.parallel) // allocation.trainer_nodes)
    plan, shapes = judged(
        config, ranks_per_node * allocation.trainer_nodes, assume, _origin(allocation, ranks_per_node)
    )
    server_nodes, servers_per_group = _servers(allocation, pool_tensor)
    has_pool = allocation.pool_nodes > 0
    job = Job(
        config=config,
        allocation=allocation,
        ranks_per_node=ranks_per_node,
        server_nodes=server_nodes,
        num_servers=allocation.pool_nodes // server_nodes * servers_per_group,
        pool_options=_pool_options(config, servers_per_group, pool_tensor) if has_pool else (),
        restarts=restarts,
    )
    refuse(_pool_problems(shapes, pool_tensor) if has_pool else [])
    refuse(_memory_problems(job, plan, shapes, pool_tensor, int(gpu_gib * 2**30)) if gpu_gib else [])
    return job


def _refuse_other_machines(config: Stage, allocation: Allocation) -> None:
    if not _BODY.is_file():
        raise RecipeError(
            f"{_BODY} is missing; `rto slurm` needs a checkout of the repository, not the package alone"
        )
    facts = facts_of(config)
    if facts.is_colocated:
        raise RecipeError(
            "rollout.colocated=true: a job on several nodes gives the pool nodes of its own; set it to false, or run "
            "`rto launch` as a job on one node"
        )
    if allocation.trainer_nodes < 1:
        raise RecipeError(
            f"--nodes {allocation.nodes} --pool-nodes {allocation.pool_nodes}: leaves no node for the trainer; --nodes "
            "counts those of the pool too"
        )
    has_servers = facts.pool is not None and bool(facts.pool.servers)
    if facts.pool is not None and not has_servers and allocation.pool_nodes == 0:
        raise RecipeError(
            f"stage {config.stage} samples from an inference pool; give it nodes with --pool-nodes"
        )
    if allocation.pool_nodes and facts.pool is None:
        raise RecipeError(
            f"--pool-nodes {allocation.pool_nodes}: stage {config.stage} needs no pool; remove it"
        )
    if allocation.pool_nodes and has_servers:
        raise RecipeError("rollout.servers names a pool that runs already; remove it or --pool-nodes")


def _folder_problems(config: Stage, allocation: Allocation) -> list[str]:
    run_dir = config.run.dir
    problems = text_problems("run.dir", str(run_dir)) + text_problems("the current folder", str(Path.cwd()))
    if "\\" in str(run_dir):
        problems.append(
            f"run.dir={run_dir}: SLURM writes no log into a path with a backslash; choose another folder"
        )
    if allocation.container is not None:
        problems += pyxis_problems(shown_folders(config, allocation))
    return problems


def _origin(allocation: Allocation, ranks_per_node: int) -> str:
    """Where the number of trainer ranks comes from, for messages."""
    unit = "GPUs" if allocation.gpus else "processes"
    nodes = f"{allocation.trainer_nodes} nodes x {ranks_per_node} {unit}"
    return (
        nodes
        if not allocation.pool_nodes
        else f"{nodes}; the pool has the other {allocation.pool_nodes} nodes"
    )


def _servers(allocation: Allocation, pool_tensor: int) -> tuple[int, int]:
    """Nodes of a server, and servers on each such group of nodes.

    Raises:
        RecipeError: servers do not fill nodes, or nodes servers.
    """
    gpus, nodes = allocation.gpus, allocation.pool_nodes
    if gpus == 0 or nodes == 0:
        return 1, 1
    if gpus % pool_tensor and pool_tensor % gpus:
        raise RecipeError(
            f"--pool-tensor {pool_tensor} does not fit nodes of {gpus} GPUs: it must divide them, or be a multiple"
        )
    server_nodes = max(1, pool_tensor // gpus)
    if nodes % server_nodes:
        raise RecipeError(
            f"--pool-tensor {pool_tensor} takes {server_nodes} nodes of {gpus} GPUs for each server, and --pool-nodes "
            f"{nodes} is no multiple of that"
        )
    return server_nodes, max(1, gpus // pool_tensor)


def _pool_options(config: Stage, servers: int, pool_tensor: int) -> tuple[str, ...]:
    sampling = facts_of(config).sampling
    assert sampling is not None
    options = [str(hugging_face_folder(config.models.policy).absolute())]
    options += ["--dtype", config.precision.dtype, "--max-model-len", str(max_model_len(sampling))]
    options += [f"--fp32-{part}" for part in config.precision.fp32_parts]
    options += ["--servers", str(servers), "--tensor-parallel", str(pool_tensor)]
    if (fraction := sampling.rollout.gpu_memory_fraction) is not None:
        options += ["--gpu-memory-fraction", str(fraction)]
    return tuple(options)


def _pool_problems(shapes: dict[str, FoundShape], pool_tensor: int) -> list[str]:
    policy = shapes.get("policy")
    if policy is None or policy.shape.num_heads % pool_tensor == 0:
        return []
    return [
        f"--pool-tensor {pool_tensor} does not divide the policy's {policy.shape.num_heads} attention heads"
    ]


def _memory_problems(
    job: Job, plan: StagePlan, shapes: dict[str, FoundShape], pool_tensor: int, gpu_bytes: int
) -> list[str]:
    trainer = fullest_bytes(plan, shapes)
    problems = []
    if trainer > gpu_bytes:
        problems.append(
            f"the trainer takes {gib(trainer)} of a GPU's {gib(gpu_bytes)}; raise parallel.tensor or parallel.pipeline "
            "or set precision.recompute or parallel.distributed_optimizer to true"
        )
    if job.num_servers and "policy" in shapes:
        weights = pool_weight_bytes(shapes["policy"].shape, weight_bytes(plan.config.precision), pool_tensor)
        if weights > gpu_bytes:
            problems.append(
                f"the pool's weights take {gib(weights)} of a GPU's {gib(gpu_bytes)}; raise --pool-tensor"
            )
    return problems


# Each would keep the job's variables from the ranks: addresses, the attempt, SLURM_JOB_ID.
_HIDES_VARIABLES = ("APPTAINER_CLEANENV", "APPTAINER_CONTAINALL")


def pyxis_options(image: str, folders: Sequence[Path]) -> tuple[str, ...]:
    """Options of srun that run a step's tasks in `image`, which shows `folders` under their own paths."""
    mounts = ",".join(f"{folder}:{folder}" for folder in folders)
    return (
        f"--container-image={_absolute(image)}",
        f"--container-mounts={mounts}",
        "--no-container-mount-home",
    )


def pyxis_problems(folders: Sequence[Path]) -> list[str]:
    """Names folders that pyxis cannot show: it splits its list at commas, colons and spaces, and knows no quotes."""
    return [
        f"--container: pyxis cannot show {folder}, as a comma, colon or space in a path ends it; rename the folder, or "
        "use --apptainer"
        for folder in folders
        if re.search(r"[,:\s]", str(folder))
    ]


def apptainer_command(image: str, folders: Sequence[Path], has_gpus: bool) -> tuple[str, ...]:
    """What stands before a command to run it in `image`, which shows `folders` under their own paths.

    --mount and not --bind, whose paths end at commas and colons: it reads fields as CSV does.
    """
    environment = [part for name in _HIDES_VARIABLES for part in ("-u", name)]
    mounts = [part for folder in folders for part in ("--mount", _mount(folder))]
    gpus = ["--nv"] if has_gpus else []
    return "env", *environment, "apptainer", "exec", *gpus, *mounts, _absolute(image)


def _mount(folder: Path) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(["type=bind", f"source={folder}", f"destination={folder}"])
    return line.getvalue()


def _absolute(image: str) -> str:
    """A file's path, which must not hang on the folder of a step; names of registries stay as they are."""
    path = Path(image)
    return str(path.absolute()) if path.exists() else image
