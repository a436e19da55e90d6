#!/usr/bin/env python
"""Scores, gradients and optimizer steps of this program beside plain transformers and torch, on the same sequences.

Usage: .venv/bin/python tools/benchmark_phases.py MODEL [--dtype bf16] [--sequences 16] [--tokens 100] [--micro 8]
           [--rounds 3]

MODEL is a Hugging Face folder. Random sequences of one length, of which two thirds are responses, so that plain torch
pads nothing; one process with OMP_NUM_THREADS threads. Plain torch is the model as transformers builds it, with
log_softmax over its logits and autograd, all in the stated dtype, and torch's clipping and fused AdamW on float32
weights, of which bf16 ones are copies, as they are here. In turns; medians of CPU seconds, and the ratio of every
round. A round goes before.
`tools/benchmark_generation.py --model MODEL` is the same for sampling.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from profile_update import add_work, phases, random_rows
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from rto_megatron.config.training import ParallelConfig
from rto_megatron.platform.device import prepare
from rto_megatron.trainer.stages import ranks


def plain_phases(options: argparse.Namespace) -> Mapping[str, Callable[[], object]]:
    """What a short program of transformers and torch does."""
    dtype = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    weights = list(model.parameters())
    masters = weights if dtype == torch.float32 else [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-6, fused=True)
    micros = random_rows(model.config.vocab_size, options).split(options.micro)
    first = options.tokens // 3
    num_asked = options.sequences * (options.tokens - first)

    def log_probs(ids_BT: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids_BT, use_cache=False).logits[:, first - 1 : -1].float()
        logp: torch.Tensor = logits.log_softmax(-1).gather(-1, ids_BT[:, first:, None])
        return logp

    def scores() -> None:
        with torch.no_grad():
            for ids_BT in micros:
                log_probs(ids_BT)

    def gradients() -> None:
        model.zero_grad()
        for ids_BT in micros:
            (-log_probs(ids_BT).sum() / num_asked).backward()

    def step() -> None:
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)

    return {"scores": scores, "gradients": gradients, "optimizer": step}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_work(parser)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with ranks(prepare(), ParallelConfig(), 0) as topology:
        sides = {
            "this program": phases(options, options.dtype, topology),
            "plain torch": plain_phases(options),
        }
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds + 1):
            for side, own in sides.items():
                for name, phase in own.items():
                    start = time.process_time()
                    phase()
                    seconds.setdefault((name, side), []).append(time.process_time() - start)
    size = f"{options.sequences} sequences of {options.tokens} tokens, {options.dtype}"
    table = Table("phase", *sides, "plain torch over this program, by round", title=f"{size}, CPU seconds")
    for name in sides["plain torch"]:
        ours, plain = (seconds[name, side][1:] for side in sides)
        ratios = ", ".join(f"{other / own:.2f}" for own, other in zip(ours, plain, strict=True))
        table.add_row(name, f"{statistics.median(ours):.2f}", f"{statistics.median(plain):.2f}", ratios)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
