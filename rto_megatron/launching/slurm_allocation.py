"""What is asked of SLURM for a job, what contradicts itself in it, and how it is written into a script."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_GPU_ENTRY = re.compile(r"gpu(:[\w.-]*[A-Za-z][\w.-]*)?(:(?P<count>\d+))?")
# MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES or DAYS-HOURS:MINUTES:SECONDS
_LIMIT = re.compile(r"((?P<days>\d+)-)?(?P<parts>\d+(:\d+){0,2})")
_SIZE = re.compile(r"\d+([KMGTP]B?)?", re.IGNORECASE)
_NO_LIMIT = ("infinite", "unlimited", "-1")
_EARLY_S = 60  # by which SLURM's signal may come before its time
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Allocation:
    """What is asked of SLURM, as the options of `rto slurm` say it.

    Args:
        nodes: all of the job; the last `pool_nodes` serve, the others train.
        gpus_per_node: None: those that `gres` names.
        interface: of every node; empty: that of the default route.
        notice_s: how long before the time limit the trainer is told to save.
        container: image of the steps, through pyxis.
        mounts: folders that the container shows beside the checkout and the run folder.
        gres: generic resources of a node, as SLURM writes them.
        apptainer: image of the steps, through Apptainer.
        is_exclusive: the nodes run no other job.
        cpus_per_task: of a node, where it is shared; exclusive nodes give all.
        memory: of a node; None: all of an exclusive one, else the site's default.
        preamble: bash that every node runs before a step.

    Example:
        Allocation(nodes=4, pool_nodes=1, gpus_per_node=8, time="12:00:00").trainer_nodes == 3
    """

    nodes: int
    pool_nodes: int = 0
    gpus_per_node: int | None = None
    interface: str = ""
    time: str | None = None
    notice_s: int = 300
    partition: str | None = None
    account: str | None = None
    container: str | None = None
    mounts: tuple[str, ...] = ()
    gres: str | None = None
    qos: str | None = None
    constraint: str | None = None
    apptainer: str | None = None
    is_exclusive: bool = True
    cpus_per_task: int | None = None
    memory: str | None = None
    preamble: Path | None = None

    @property
    def trainer_nodes(self) -> int:
        """Nodes with trainer ranks."""
        return self.nodes - self.pool_nodes

    @property
    def gpus(self) -> int:
        """GPUs of a node."""
        return self.gpus_per_node or _named_gpus(self.gres) or 0

    @property
    def gpu_options(self) -> dict[str, str]:
        """Options of sbatch and srun that ask for a node's GPUs; never twice, as sites may know only one of the two."""
        options = {} if self.gres is None else {"gres": self.gres}
        return (
            options
            if _named_gpus(self.gres) or not self.gpus
            else options | {"gpus-per-node": str(self.gpus)}
        )

    def problems(self) -> list[str]:
        """What is unknown or contradicts itself, one sentence each."""
        return [*self._text_problems(), *self._resource_problems(), *self._container_problems()] + (
            [] if self.preamble is None else _preamble_problems(self.preamble)
        )

    def _text_problems(self) -> list[str]:
        texts = {
            "--interface": self.interface or None, "--time": self.time, "--partition": self.partition,
            "--account": self.account, "--qos": self.qos, "--constraint": self.constraint, "--gres": self.gres,
            "--mem": self.memory, "--container": self.container, "--apptainer": self.apptainer,
        }  # fmt: skip
        given = [(name, text) for name, text in texts.items() if text is not None]
        given += [("--mount", folder) for folder in self.mounts]
        return [problem for name, text in given for problem in text_problems(name, text)]

    def _resource_problems(self) -> list[str]:
        problems = [
            f"--gres {entry}: GPUs of a node are written gpu:COUNT or gpu:TYPE:COUNT, as in gpu:8 or gpu:h100:8"
            for entry in _gpu_entries(self.gres)
            if not _GPU_ENTRY.fullmatch(entry)
        ]
        named = _named_gpus(self.gres)
        if not problems and named is not None and self.gpus_per_node not in (None, named):
            problems.append(
                f"--gres {self.gres} names {named} GPUs of a node, and --gpus-per-node {self.gpus_per_node}; give one "
                "of the two, --gres where the site does not know the other"
            )
        if self.time is not None and not _is_limit(self.time):
            problems.append(
                f"--time {self.time}: no limit that SLURM reads; expected minutes, hours:minutes:seconds or "
                "days-hours, as in 90, 24:00:00 or 2-12"
            )
        if self.memory is not None and self.memory.strip() and not _SIZE.fullmatch(self.memory.strip()):
            problems.append(
                f"--mem {self.memory}: no size that SLURM reads; expected a number with K, M, G or T, as in 500G"
            )
        limit_s = None if self.time is None else _seconds(self.time)
        if limit_s is not None and limit_s <= self.notice_s + _EARLY_S:
            problems.append(
                f"--time {self.time} --notice {self.notice_s}: SLURM would tell the job to save as soon as it starts, "
                f"as it may do so {_EARLY_S} s early, and the job would queue itself again for ever; raise --time or "
                "lower --notice"
            )
        if self.is_exclusive and self.cpus_per_task is not None:
            problems.append(
                f"--cpus-per-task {self.cpus_per_task} has no effect on exclusive nodes, which give all their CPUs; "
                "remove it, or share the nodes with --no-exclusive"
            )
        if not self.is_exclusive and self.cpus_per_task is None:
            problems.append(
                "--no-exclusive: SLURM would give the job one CPU of each node; ask for more with --cpus-per-task"
            )
        return problems

    def _container_problems(self) -> list[str]:
        problems = []
        if self.container is not None and self.apptainer is not None:
            problems.append("--container (pyxis) and --apptainer both name an image; give one of the two")
        if self.mounts and self.container is None and self.apptainer is None:
            problems.append(
                f"--mount {self.mounts[0]} has no effect without a container; remove it, or name an image with "
                "--container (pyxis) or --apptainer"
            )
        return problems + [
            f"--mount {folder}: is no folder here; the container shows a folder under its own path, so name it alone"
            for folder in self.mounts
            if ":" in folder and not Path(folder).exists()
        ]

    def options(self) -> dict[str, str | None]:
        """Options of sbatch; those without a value are None, flags have an empty one."""
        return {
            "nodes": str(self.nodes),
            "ntasks-per-node": "1",
            **self.gpu_options,
            "cpus-per-task": None if self.cpus_per_task is None else str(self.cpus_per_task),
            "mem": self.memory or ("0" if self.is_exclusive else None),
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "signal": f"B:USR1@{self.notice_s}",
            "exclusive": "" if self.is_exclusive else None,
        }


def _is_limit(text: str) -> bool:
    """Whether sbatch takes it; an empty text is refused with all others."""
    given = text.strip()
    return not given or given.lower() in _NO_LIMIT or _LIMIT.fullmatch(given) is not None


def _seconds(limit: str) -> int | None:
    """Of a limit as SLURM writes it; None where there is none, or sbatch will refuse it."""
    found = _LIMIT.fullmatch(limit.strip())
    if found is None:
        return None
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:
        parts = [24 * int(found["days"]) + parts[0], *parts[1:], 0, 0][:3]
    elif len(parts) < 3:
        parts = [0, *parts, 0][:3]
    hours, minutes, seconds = parts
    return 3600 * hours + 60 * minutes + seconds or None


def text_problems(name: str, text: str) -> list[str]:
    """Why `text` cannot stand in a line of a script: one that broke it could hold another option."""
    if not text.strip():
        return [f"{name}: found an empty text; remove it"]
    if _CONTROL_CHARACTER.search(text):
        return [
            f"{name}: found {text!r}; a line break or another control character cannot stand in a job script"
        ]
    return []


def directives(options: Mapping[str, str | None]) -> list[str]:
    """The #SBATCH lines of `options`, without those that are None.

    sbatch cuts an unquoted value at a space or #, and reads a backslash as in double quotes of a shell, where $ and `
    mean nothing to it (seen with 22.05).
    """
    return [
        f"#SBATCH --{name}" + (f"={_quoted(value)}" if value else "")
        for name, value in options.items()
        if value is not None
    ]


def log_pattern(folder: Path) -> str:
    """What --output takes for FOLDER/log-JOB.txt; the folder must have no backslash, which would switch %j off."""
    return str(folder).replace("%", "%%") + "/log-%j.txt"


def _quoted(value: str) -> str:
    if re.fullmatch(r"[\w./:@%+,=-]+", value, re.ASCII):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _gpu_entries(gres: str | None) -> list[str]:
    return [entry for entry in (gres or "").split(",") if re.match(r"(gres[:/])?gpu\b", entry.strip())]


def _named_gpus(gres: str | None) -> int | None:
    """GPUs of a node in `gres`; None if it names none."""
    found = [match for entry in _gpu_entries(gres) if (match := _GPU_ENTRY.fullmatch(entry))]
    return sum(int(match["count"] or 1) for match in found) if found else None


def _preamble_problems(preamble: Path) -> list[str]:
    try:
        text = preamble.read_text()
    except (OSError, UnicodeDecodeError) as error:
        return [f"--preamble {preamble}: cannot be read: {error}; name a file of bash commands"]
    problems = [
        f"--preamble {preamble}:{number}: found {line.strip()!r}, which has no effect there; give it to `rto slurm`"
        for number, line in enumerate(text.splitlines(), 1)
        if line.startswith("#SBATCH")
    ]
    checked = subprocess.run(["bash", "-n", str(preamble)], capture_output=True, text=True, check=False)
    if checked.returncode:
        problems.append(f"--preamble {preamble}: is no bash: {checked.stderr.strip()}")
    return problems
