#!/usr/bin/env python
"""Log-probs from states in chunks against all logits at once: time and peak memory, forward and with gradients.

Usage: .venv/bin/python tools/benchmark_head.py [--positions 4096] [--columns 16384] [--hidden 512] [--asked 0.5]
           [--dtype fp32] [--repeats 3]

The plain way is what Megatron does: logits of every position, a float32 copy, its vocabulary-parallel cross entropy.
`--asked` is the share of positions that are responses: the chunks read those alone. One process and one thread, on the
machine's GPU if it has one; memory is the allocator's peak beyond inputs (on a CPU by torch's profiler, in a run of its
own).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rto_megatron.config.training import ParallelConfig
from rto_megatron.models.head_memory import CHUNK_POSITIONS
from rto_megatron.models.output_head import OutputProjection, Targets
from rto_megatron.models.token_logprobs import token_logprobs
from rto_megatron.platform.device import prepare
from rto_megatron.trainer.stages import ranks


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=16384, help="of the vocabulary on this rank")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--asked", type=float, default=0.5)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def _seconds(run: Callable[[], object], repeats: int) -> float:
    """The median; the first call, which warms up, does not count. On a CPU the process's own time counts."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    took = []
    for _ in range(repeats + 1):
        start = clock()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append(clock() - start)
    return statistics.median(took[1:])


def _peak_bytes(run: Callable[[], object]) -> int:
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def main() -> None:
    """Prints the table."""
    options, device = _options(), prepare()
    torch.set_num_threads(1)
    with ranks(device, ParallelConfig(), seed=0) as place:
        group = place.tensor_group()
        dtype = torch.float32 if options.dtype == "fp32" else torch.bfloat16
        on, (num_columns, size) = device.torch_device, (options.columns, options.hidden)
        hidden = torch.randn(options.positions, size, device=on, dtype=dtype).requires_grad_()
        # Logits of a standard deviation of 1: numbers below the smallest normal one would slow a CPU down.
        weight = (torch.randn(num_columns, size, device=on, dtype=dtype) / size**0.5).requires_grad_()
        targets = torch.randint(options.columns, (options.positions,), device=device.torch_device)
        asked = torch.arange(int(options.asked * options.positions), device=device.torch_device)

        def plain() -> Tensor:
            logits = (hidden @ weight.t()).float()[:, None]
            logp: Tensor = -vocab_parallel_cross_entropy(
                logits.contiguous(), targets[:, None], tp_group=group
            )
            return logp[asked, 0]

        def chunked() -> Tensor:
            some = Targets(targets[asked])
            projection = OutputProjection(weight, options.columns, group)
            return token_logprobs(hidden[asked], projection, some, CHUNK_POSITIONS)

        def score(read: Callable[[], Tensor]) -> None:
            with torch.no_grad():
                read()

        def train(read: Callable[[], Tensor]) -> None:
            hidden.grad = weight.grad = None
            read().sum().backward()

        table = Table("", "score, s", "train, s", "score, MiB", "train, MiB")
        for name, read in (("all logits", plain), ("in chunks", chunked)):
            passes = [partial(score, read), partial(train, read)]
            times = [_seconds(one, options.repeats) for one in passes]
            peaks = [_peak_bytes(one) for one in passes]
            table.add_row(name, *(f"{t:.2f}" for t in times), *(f"{p / 2**20:.0f}" for p in peaks))
        with torch.no_grad():
            difference = float((plain() - chunked()).abs().max())
    console = Console()
    console.print(table)
    console.print(f"log-probs differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
