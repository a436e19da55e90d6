"""Real launches of tiny stages, and what must be gone when they have ended."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from trainer.tiny_runs import configure

from rto_megatron.lifecycle.stacks import ranks_of

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Launch:
    """A running `rto launch`."""

    process: subprocess.Popen[str]
    run_dir: Path
    shared_memory: frozenset[str]  # before it

    def ranks(self, count: int = 2) -> list[psutil.Process]:
        """Its ranks, by rank, once so many run Python."""
        wait_until(lambda: len(ranks_of(psutil.Process(self.process.pid))) == count, self)
        found = ranks_of(psutil.Process(self.process.pid))
        return sorted(found, key=lambda rank: int(rank.environ()["RANK"]))

    def end(self, timeout_s: float = 400) -> str:
        """Waits for its end and checks that nothing of it is left; returns all that it said."""
        said, _ = self.process.communicate(timeout=timeout_s)
        assert_gone(self.run_dir)
        assert [path for path in self.run_dir.rglob("*") if path.stat().st_mode & stat.S_IWOTH] == []
        assert unowned(frozenset(os.listdir("/dev/shm")) - self.shared_memory) == set()
        return said

    def status(self) -> dict[str, object]:
        """run_status.json."""
        return json.loads((self.run_dir / "run_status.json").read_text())


def start(
    files: Path,
    run_dir: Path,
    *,
    stage: str = "sft",
    faults: str = "",
    ranks: int = 2,
    options: Sequence[str] = (),
    torchrun: Sequence[str] | None = None,
    num_threads: int = 1,
    **changes: object,
) -> Launch:
    """Launches a tiny stage of four steps on `ranks` replicas, saved at every step, with a plan of faults.

    The shell's mask lets every user write, and no file of the run may be so in the end.

    Args:
        torchrun: options of a plain torchrun in place of `rto launch`.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    config = configure(stage, files, run_dir, **{"run__save_every": 1, "run__keep_checkpoints": 9, **changes})
    recipe = run_dir.parent / f"{run_dir.name}.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(num_threads),
        "RTO_FAULT": faults,
        "RTO_FAULT_LOG": str(fault_log(run_dir)),
        "COLUMNS": "200",
        "PET_MASTER_PORT": "1",  # of an operator; `rto launch` makes its own meeting point
        "PET_RDZV_BACKEND": "static",
    }
    rto = ["-m", "rto_megatron.cli.main"]
    if torchrun is None:
        arguments = [*rto, "launch", str(recipe), f"--ranks={ranks}", *options]
    else:
        plain = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *torchrun]
        arguments = [*plain, *rto, "train", str(recipe)]
        environment = {name: value for name, value in environment.items() if not name.startswith("PET_")}
    shared_memory = frozenset(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        umask=0,
    )
    return Launch(process, run_dir, shared_memory)


def kills(count: int) -> list[str]:
    """A plan of up to twelve kills, one an attempt, three in each step.

    No two of the same rank in a row: those would count as one crash that repeats.
    """
    places = ("fwd_bwd:{}:1", "opt_step:{}:0", "ckpt_shard:{}:1")
    return [places[number % 3].format(1 + number // 3) + ":kill" for number in range(count)]


def fault_log(run_dir: Path) -> Path:
    """Where the faults that fired are noted."""
    return run_dir.parent / f"{run_dir.name}.faults"


def fired(run_dir: Path) -> list[str]:
    """The faults that fired, in order."""
    log = fault_log(run_dir)
    return log.read_text().splitlines() if log.exists() else []


def wait_until(is_so: Callable[[], bool], launch: Launch, timeout_s: float = 120) -> None:
    """Waits while the launch runs."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert launch.process.poll() is None, launch.process.communicate()[0]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def listeners(launch: Launch) -> set[str]:
    """The addresses on which the launcher and its ranks listen."""
    launcher = psutil.Process(launch.process.pid)
    return {
        one.laddr.ip
        for process in (launcher, *launcher.children(recursive=True))
        for one in process.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    }


def of_run(run_dir: Path) -> list[psutil.Process]:
    """The live processes whose command line names a file of the run."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if (
                any(word.startswith(str(run_dir)) for word in words)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_gone(run_dir: Path) -> None:
    """No process of the run is left, and so no port of one."""
    assert of_run(run_dir) == []


def unowned(segments: frozenset[str]) -> set[str]:
    """Those of these names in /dev/shm that no living process has mapped or open: nobody will remove them.

    Without those of vLLM: these launches have no server, and other tests kill theirs at the same time.
    """
    segments = frozenset(name for name in segments if not name.startswith(("vllm", "psm_")))
    owned = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = (process / "maps").read_text() + "".join(
                str(f.readlink()) for f in (process / "fd").iterdir()
            )
        except OSError:  # it has ended, or is not ours
            continue
        owned |= {name for name in segments if f"/dev/shm/{name}" in held}
    return {name for name in segments - owned if Path("/dev/shm", name).exists()}


def send(launch: Launch, signum: signal.Signals) -> None:
    """To the launcher alone, as `kill` does."""
    os.kill(launch.process.pid, signum)
