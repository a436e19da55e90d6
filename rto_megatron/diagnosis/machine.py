"""The machine under a rank: compiler, GPUs, shared memory and clocks."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

from rto_megatron.diagnosis.finding import Finding, Level

_MIB = 1024**2
_SMALLEST_SHARED_MEMORY = 1024 * _MIB
_SHARED_NAMES = ("psm_", "torch_", "nccl-", "sem.mp-")  # Python's (vLLM's queues), torch's, NCCL's
_CLOCK_SAMPLE_S = 0.05
_LARGEST_CLOCK_STEP_S = 0.5
_EXTENSION = "#include <Python.h>\nint answer(void) { return PY_MAJOR_VERSION; }\n"


def check_compiler() -> list[Finding]:
    """Compiles a file against Python's headers, as Triton does for every GPU kernel."""
    import torch

    level: Level = "problem" if torch.cuda.is_available() else "warning"
    why = "Triton compiles with it: nothing runs on a GPU without, and torch.compile needs it everywhere"
    compiler = os.environ.get("CC") or next(
        (name for name in ("cc", "gcc", "clang") if shutil.which(name)), None
    )
    if compiler is None:
        return [
            Finding(
                "compiler", level, "no C compiler (cc, gcc, clang) on the PATH", why, "apt-get install gcc"
            )
        ]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "answer.c"
        source.write_text(_EXTENSION)
        include = f"-I{sysconfig.get_paths()['include']}"
        command = [*shlex.split(compiler), "-shared", "-fPIC", include, str(source), "-o", f"{source}.so"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f"status {ran.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        fix = "install the headers of this Python (python3.12-dev), or set CC to a compiler that works"
        return [Finding("compiler", level, f"{compiler} does not compile: {first}", why, fix)]
    return [Finding("compiler", "ok", f"{compiler} compiles an extension of Python")]


def check_gpus() -> list[Finding]:
    """GPUs with memory, driver and NCCL; whether each reaches the others' memory; or that there is none."""
    import torch

    present = _gpus_of_driver()
    if not torch.cuda.is_available():
        if not present or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            return [Finding("GPUs", "ok", "no GPU: ranks talk over gloo, and a pool wants vLLM's CPU build")]
        return [
            Finding(
                "GPUs",
                "problem",
                f"the driver shows {len(present)} GPUs and torch {torch.__version__} none",
                "ranks would run on the CPU",
                "RTO_VARIANT=gpu bash launchers/setup.sh; if torch is a CUDA build, renew the driver",
            )
        ]
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    memory = min(torch.cuda.mem_get_info(index)[1] for index in range(count)) / 1024**3
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    found = (
        f"{count} x {' and '.join(names)}, {memory:.0f} GiB; driver {present[0] if present else 'unknown'}, "
        f"CUDA {torch.version.cuda}, NCCL {nccl}"
    )
    return [Finding("GPUs", "ok", found), *_busy(count), *_peers(count)]


def _gpus_of_driver() -> list[str]:
    """The driver's version, once for each GPU that nvidia-smi lists."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return ran.stdout.split() if ran.returncode == 0 else []


def _busy(count: int) -> list[Finding]:
    import torch

    shares = {
        index: 1 - free / total for index in range(count) for free, total in [torch.cuda.mem_get_info(index)]
    }
    busy = [f"GPU {index}: {share:.0%}" for index, share in shares.items() if share > 0.1]
    if not busy:
        return []
    why = "a rank or server there ends for lack of memory, often late"
    return [
        Finding(
            "GPUs", "warning", f"memory in use already: {', '.join(busy)}", why, "nvidia-smi, and stop them"
        )
    ]


def _peers(count: int) -> list[Finding]:
    import torch

    apart = [
        f"{a}-{b}" for a, b in permutations(range(count), 2) if not torch.cuda.can_device_access_peer(a, b)
    ]
    if not apart:
        return [Finding("peer access", "ok", "every GPU reaches every other's memory")] if count > 1 else []
    why = (
        "NCCL copies through host memory between them, several times slower; tensor parallelism suffers most"
    )
    fix = "keep tensor-parallel ranks on GPUs that reach each other (nvidia-smi topo -p2p r)"
    return [
        Finding("peer access", "warning", f"no direct access between GPUs {', '.join(apart[:8])}", why, fix)
    ]


def check_shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Size of the shared memory, and what ended processes of this user left in it."""
    usage = shutil.disk_usage(folder)
    findings = []
    if usage.free < _SMALLEST_SHARED_MEMORY:
        findings.append(
            Finding(
                "shared memory",
                "warning",
                f"{folder} has {usage.free // _MIB} MiB free of {usage.total // _MIB}",
                "NCCL and vLLM's workers exchange data there and die with a bus error when it is full",
                "docker run --ipc=host or --shm-size=16g; mount -o remount,size=16g /dev/shm",
            )
        )
    left = _leftovers(folder)
    if left:
        size = sum(path.stat().st_size for path in left) // _MIB
        names = " ".join(map(str, left))
        found = f"{len(left)} segments of ended processes in {folder}, {size} MiB"
        why = "each killed server leaves some, until the memory is full"
        fix = f"unless a container with processes of its own shares {folder}: rm {names}"
        findings.append(Finding("shared memory", "warning", found, why, fix))
    return findings or [
        Finding("shared memory", "ok", f"{folder}: {usage.free // _MIB} MiB free, nothing left over")
    ]


def _leftovers(folder: Path) -> list[Path]:
    """Segments of this user, by the names that our libraries give, that no process has open or mapped."""
    own = [
        path
        for path in sorted(folder.iterdir())
        if path.name.startswith(_SHARED_NAMES) and path.is_file() and path.stat().st_uid == os.getuid()
    ]
    used: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*") if own else ():
        mentioned = _files_of(process)
        used |= {path for path in own if str(path) in mentioned}
    return [path for path in own if path not in used]


def _files_of(process: Path) -> str:
    """What a process maps and has open, as text; less where it ended meanwhile or is another user's."""
    mentioned = []
    with contextlib.suppress(OSError):
        mentioned.append((process / "maps").read_text())
        for entry in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                mentioned.append(os.readlink(entry))
    return "\n".join(mentioned)


def check_clock(wall: Callable[[], float] = time.time) -> list[Finding]:
    """The wall clock against the monotonic one, over a moment."""
    monotonic, started = time.monotonic(), wall()
    time.sleep(_CLOCK_SAMPLE_S)
    step = abs((wall() - started) - (time.monotonic() - monotonic))
    if step > _LARGEST_CLOCK_STEP_S:
        why = "logs and file times lie, and certificates and leases end early"
        found = f"the wall clock jumped by {step:.1f} s while it was watched"
        return [Finding("clock", "warning", found, why, "timedatectl set-ntp true")]
    return [Finding("clock", "ok", "the wall clock runs evenly")]
