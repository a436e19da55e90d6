#!/usr/bin/env python
"""What the start of a stage takes, by part: CPU seconds of imports, or whole launches.

Usage: .venv/bin/python tools/start_up.py [--rounds 2] [--longest 12]
       .venv/bin/python tools/start_up.py --launch [--checkout DIR ...] [--ranks 2] [--rounds 2]

Without --launch each line is a process of its own that imports what a launcher, a trainer rank or a vLLM server
imports, up to a point; medians of the rounds, in turns. CPU seconds, as many of these processes start at once on a
machine with few cores. Below them stands which packages a rank's imports go to. `python -X importtime` says more.

With --launch `rto launch` makes the first step of the quickstart's RTO recipe, with a pool that it starts, on models
with random weights. Seconds until the pool was ready and until the step was made, and CPU seconds of all processes
until then; below them what each launch says of its start. --checkout names other checkouts of this program, which are
launched in turn with this one by the same Python; `git worktree add DIR COMMIT` makes one. About a minute a launch.
"""

import argparse
import collections
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

_ROOT = Path(__file__).parents[1]
_RESTING = "from rto_megatron.platform.collector import resting\nwith resting(): "
_PREPARED = f"{_RESTING}from rto_megatron.platform.device import prepare; prepare()"
_ONLINE = f"{_PREPARED}; import rto_megatron.trainer.online"
_PARTS = {
    "launcher: `rto launch`": f"{_RESTING}import rto_megatron.launching.attempts, "
    "rto_megatron.launching.launched_pool, rto_megatron.trainer.finished",
    "rank: the interpreter and torch": "import torch",
    "rank: until the device is prepared": _PREPARED,
    "rank: until a stage without a pool runs": f"{_PREPARED}; import rto_megatron.trainer.offline",
    "rank: until a stage that samples runs": _ONLINE,
    "server: vLLM's API server": "import vllm.entrypoints.openai.api_server",
    "server: its engine, with this package's worker": "import rto_megatron.generation.vllm.worker.plugin",
}
_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s*([\w]+)")
_WORK = Namespace(prompts=None, steps=2, batch=32, tokens=40, max_prompt=64, hidden=128, layers=2, vocab=2000)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--longest", type=int, default=12, help="packages of a rank that are shown")
    parser.add_argument("--launch", action="store_true", help="whole launches in place of imports")
    parser.add_argument("--checkout", type=Path, action="append", default=[], help="another one to launch")
    parser.add_argument("--ranks", type=int, default=2, help="of a launch")
    options = parser.parse_args()
    if options.launch:
        launches([*options.checkout, _ROOT], options.ranks, options.rounds)
    else:
        imports(options.rounds, options.longest)


def imports(rounds: int, longest: int) -> None:
    """CPU seconds of the imports of each process."""
    found: dict[str, list[float]] = {name: [] for name in _PARTS}
    for _ in range(rounds):
        for name, code in _PARTS.items():
            found[name].append(_cpu_seconds(code))
    table = Table("process", "CPU s")
    for name, seconds in found.items():
        table.add_row(name, f"{statistics.median(seconds):.1f}")
    console = Console(width=100)
    console.print(table)
    packages = Table("package of a rank that samples", "share of its imports")
    of_package = _self_times(_ONLINE)
    for name, time_us in of_package.most_common(longest):
        packages.add_row(name, f"{time_us / of_package.total():.1%}")
    console.print(packages)


@dataclass(frozen=True)
class Launched:
    """Seconds since the launch, and CPU seconds of all its processes, at the end of the first step."""

    ready: float  # the pool
    step: float
    cpu: float
    told: str  # by the launch itself; empty where it says nothing


def launches(checkouts: Sequence[Path], ranks: int, rounds: int) -> None:
    """First steps of the checkouts, in turns."""
    found: dict[Path, list[Launched]] = {checkout: [] for checkout in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        keys = _written_work(Path(folder))
        for number in range(rounds):
            for place, checkout in enumerate(checkouts):
                run_dir = Path(folder) / f"run-{number}-{place}"
                found[checkout].append(launched(checkout, [*keys, f"run.dir={run_dir}"], ranks))
    table = Table("checkout", "pool ready s", "first step s", "CPU s until then")
    for checkout, made in found.items():
        columns = ([one.ready for one in made], [one.step for one in made], [one.cpu for one in made])
        shown = (f"{statistics.median(each):.1f} ({min(each):.1f}-{max(each):.1f})" for each in columns)
        table.add_row(str(checkout), *shown)
    console = Console(width=140, highlight=False)
    console.print(table)
    for checkout, made in found.items():
        for one in made:
            console.print(f"{checkout.name}: {one.told or 'says nothing of its start'}", soft_wrap=True)


def launched(checkout: Path, keys: Sequence[str], ranks: int) -> Launched:
    """Makes a first step; ends this program where it is not made."""
    recipe = checkout / "launchers" / "recipes" / "quickstart" / "rto.yaml"
    program = [sys.executable, "-u", "-m", "rto_megatron.cli.main", "launch", str(recipe), f"--ranks={ranks}"]
    began, said, ready, step, cpu = time.monotonic(), [], 0.0, 0.0, 0.0
    with _running([*program, *keys], checkout) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            now = time.monotonic() - began
            if line.startswith("inference server ") and " is ready" in line:
                ready = now
            if line.startswith("rto 1/"):
                step, cpu = now, _tree_cpu_seconds(process.pid)
    if not step:
        sys.exit(f"error: {checkout} made no step; it said:\n{''.join(said)}")
    told = next((line.strip() for line in said if line.startswith("start-up ")), "")
    return Launched(ready, step, cpu, told)


@contextmanager
def _running(command: Sequence[str], checkout: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**_environment(), "PYTHONPATH": str(checkout), "COLUMNS": "200"}
    process = subprocess.Popen(
        command,
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _tree_cpu_seconds(pid: int) -> float:
    """Of a process and of all that it started, those that have ended too."""
    root = psutil.Process(pid)
    spent = 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            spent += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return spent


def _written_work(folder: Path) -> list[str]:
    """Models, tokenizer and prompts, as overrides of the recipe."""
    from benchmark_rto import keys_of, write_work
    from side_by_side import Way

    work = write_work(folder, _WORK)
    return [key for key in keys_of(work, folder, Way(2, 1, 8)) if not key.startswith("run.dir=")]


def _environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _cpu_seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], env=_environment(), check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _self_times(code: str) -> collections.Counter[str]:
    """Package -> microseconds of its own modules."""
    command = [sys.executable, "-X", "importtime", "-c", code]
    told = subprocess.run(command, env=_environment(), check=True, capture_output=True, text=True).stderr
    times: collections.Counter[str] = collections.Counter()
    for line in told.splitlines():
        if (match := _LINE.match(line)) is not None:
            times[match[2]] += int(match[1])
    return times


if __name__ == "__main__":
    main()
