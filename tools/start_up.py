#!/usr/bin/env python
"""CPU seconds that the processes of a stage take before they do anything, by part.

Usage: .venv/bin/python tools/start_up.py [--rounds 3] [--longest 12]

Each line is a process of its own that imports what a launcher, a trainer rank or a vLLM server imports, up to a point;
medians of the rounds, in turns. CPU seconds, as many of these processes start at once on a machine with few cores.
Below them stands which packages a rank's imports go to. `python -X importtime` says more.
"""

import argparse
import collections
import os
import re
import resource
import statistics
import subprocess
import sys

from rich.console import Console
from rich.table import Table

_PREPARED = "from rto_megatron.platform.device import prepare; prepare()"
_ONLINE = f"{_PREPARED}; import rto_megatron.trainer.online"
_PARTS = {
    "launcher: `rto launch`": "import rto_megatron.launching.attempts, rto_megatron.launching.launched_pool",
    "rank: the interpreter and torch": "import torch",
    "rank: until the device is prepared": _PREPARED,
    "rank: until a stage without a pool runs": f"{_PREPARED}; import rto_megatron.trainer.offline",
    "rank: until a stage that samples runs": _ONLINE,
    "server: vLLM's API server": "import vllm.entrypoints.openai.api_server",
    "server: its engine, with this package's worker": "import rto_megatron.generation.vllm.worker.plugin",
}
_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s*([\w]+)")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=12, help="packages of a rank that are shown")
    options = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in _PARTS}
    for _ in range(options.rounds):
        for name, code in _PARTS.items():
            found[name].append(_cpu_seconds(code))
    table = Table("process", "CPU s")
    for name, seconds in found.items():
        table.add_row(name, f"{statistics.median(seconds):.1f}")
    console = Console(width=100)
    console.print(table)
    packages = Table("package of a rank that samples", "share of its imports")
    of_package = _self_times(_ONLINE)
    for name, time in of_package.most_common(options.longest):
        packages.add_row(name, f"{time / of_package.total():.1%}")
    console.print(packages)


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
