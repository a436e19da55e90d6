#!/usr/bin/env python
"""Where the CPU time of scores and gradients goes, by operator, in fp32 and in bf16.

Usage: .venv/bin/python tools/profile_update.py MODEL [--sequences 16] [--tokens 100] [--micro 8] [--rows 12]

MODEL is a Hugging Face folder. One rank scores random sequences, of which two thirds are responses, takes gradients and
an optimizer step: first without the profiler, for CPU seconds, then with it, for shares. OMP_NUM_THREADS is heeded.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from rto_megatron.algorithms.sft import SFT, Config
from rto_megatron.config.training import OptimizerConfig, ParallelConfig, PrecisionConfig, TrainParallelConfig
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.device import prepare
from rto_megatron.trainer.stages import ranks
from rto_megatron.types import SupervisedMicrobatch


def main() -> None:
    """Print a table of each dtype."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_work(parser)
    parser.add_argument("--rows", type=int, default=12)
    options = parser.parse_args()
    with ranks(prepare(), ParallelConfig(), 0) as topology:
        for dtype in ("fp32", "bf16"):
            own = phases(options, dtype, topology)
            for phase in own.values():
                phase()
            for name, phase in own.items():
                _show(f"{name} in {dtype}", phase, options.rows)


def add_work(parser: argparse.ArgumentParser) -> None:
    """Options that say which model reads which sequences."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--micro", type=int, default=8)


def phases(
    options: argparse.Namespace, dtype: Literal["fp32", "bf16"], topology: Topology
) -> dict[str, Callable[[], object]]:
    """Scores, gradients and an optimizer step over random sequences of `options`."""
    from rto_megatron.data.packing import token_batch
    from rto_megatron.engine.build_roles import build_trained
    from rto_megatron.engine.source import find_source

    source = find_source(options.model, False, is_random=False, key="MODEL")
    optimizer, parallel = OptimizerConfig(lr=1e-6), TrainParallelConfig()
    precision = PrecisionConfig(dtype=dtype)
    model = build_trained("policy", source, False, precision, optimizer, topology, 0, parallel)
    rows = random_rows(model.shape.vocab_size, options).tolist()
    pairs: Sequence[tuple[list[int], int]] = [(row, options.tokens // 3) for row in rows]
    device, micro = topology.device.torch_device, options.micro
    batches = [
        token_batch(pairs[first : first + micro], True, 1, device) for first in range(0, len(pairs), micro)
    ]
    weight = 1 / sum(len(batch.asked_N) for batch in batches)
    micros = [SupervisedMicrobatch(batch, torch.full(batch.tokens_T.shape, weight)) for batch in batches]
    names = [["random"]] * len(micros)
    return {
        "scores": lambda: model.token_outputs(batches),
        "gradients": lambda: model.gradients(micros, SFT(Config()).loss, names),
        "optimizer": lambda: model.apply(1e-6),
    }


def random_rows(vocab_size: int, options: argparse.Namespace) -> torch.Tensor:
    """Token ids, the same at every call: int64 [sequences, tokens]."""
    shape = (options.sequences, options.tokens)
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


def _show(title: str, phase: Callable[[], object], num_rows: int) -> None:
    start = time.process_time()
    phase()
    seconds = time.process_time() - start
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        phase()
    operators = sorted(profiled.key_averages(), key=lambda one: -one.self_cpu_time_total)
    total = sum(one.self_cpu_time_total for one in operators)
    table = Table("operator", title=f"{title}: {seconds:.2f} CPU seconds")
    for column in ("share", "about s", "calls"):
        table.add_column(column, justify="right")
    for one in operators[:num_rows]:
        share = one.self_cpu_time_total / total
        table.add_row(
            one.key.removeprefix("aten::"), f"{share:.1%}", f"{share * seconds:.2f}", f"{one.count}"
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
