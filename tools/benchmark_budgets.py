#!/usr/bin/env python
"""What `batch.tokens` is worth on real lengths: tokens a second of training, and how evenly replicas are loaded.

Usage: .venv/bin/python tools/benchmark_budgets.py DATA/preferences_train.jsonl.gz [--replicas 2 4 8] [--rounds 3]

The pairs are read with a tokenizer that is trained on them. The first table needs no model: FLOPs of the busiest of the
replicas over those of the mean one, for a policy and a reference of Llama-3-8B's shape, over all global batches of a
pass; a step takes as long as the busiest. The second trains a small model, really, on this machine's first device:
tokens a second of forward and backward, padding not counted, the best of several rounds in turn; and before it the
passes of a DPO step with prompts computed once and with each response. On a CPU it is a single thread's own time, so
that other programs on the machine do not count.
"""

import argparse
import gzip
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from rto_megatron.algorithms.dpo import DPO
from rto_megatron.algorithms.dpo import Config as DpoConfig
from rto_megatron.algorithms.sft import SFT, Config
from rto_megatron.config.training import OptimizerConfig, ParallelConfig, PrecisionConfig, TrainParallelConfig
from rto_megatron.data.batches import Batches
from rto_megatron.data.cut import Layout
from rto_megatron.data.grouping import lengths_of, read_lengths
from rto_megatron.data.limits import Limits
from rto_megatron.data.loader import load_pairs
from rto_megatron.data.packing import pair_microbatches, supervised_microbatches
from rto_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from rto_megatron.engine.build_roles import build_trained
from rto_megatron.engine.megatron import TrainedModel
from rto_megatron.engine.source import find_source
from rto_megatron.models.model_flops import forward_flops
from rto_megatron.parallel.topology import Topology
from rto_megatron.planning.known_shapes import KNOWN_SHAPES
from rto_megatron.platform.device import prepare
from rto_megatron.trainer.stages import ranks
from rto_megatron.types import Demonstration, PreferencePair

_VOCAB_SIZE = 8192
_LIMITS = Limits(max_prompt_tokens=1024, max_length=2048, overlong="truncate_left")


def texts_of(path: Path, num_rows: int = 2000) -> Iterator[str]:
    """What a tokenizer is trained on."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for _, line in zip(range(num_rows), lines, strict=False):
            yield from (turn["content"] for turn in json.loads(line)["chosen"])


def costs_of(pair: PreferencePair) -> float:
    """FLOPs of one forward of two models of Llama-3-8B's shape."""
    return 2 * forward_flops(KNOWN_SHAPES["llama-3-8b"], False, read_lengths(pair))


def imbalance(
    pairs: Sequence[PreferencePair], global_batch: int, replicas: int, is_dealt: bool
) -> list[float]:
    """Busiest over mean FLOPs of the replicas, of every global batch of a pass."""
    cost = costs_of if is_dealt else None
    walks = [Batches(pairs, global_batch, 1, rank, replicas, cost) for rank in range(replicas)]
    found = []
    for _ in range(walks[0].batches_per_epoch):
        loads = [sum(map(costs_of, walk.next_batch())) for walk in walks]
        found.append(max(loads) / statistics.fmean(loads))
    return found


def balance_table(pairs: Sequence[PreferencePair], all_replicas: Sequence[int]) -> Table:
    """The first table."""
    table = Table("global batch", "replicas", "every n-th: mean, worst", "by FLOPs: mean, worst")
    for global_batch in (64, 256):
        for replicas in all_replicas:
            row = []
            for is_dealt in (False, True):
                found = imbalance(pairs, global_batch, replicas, is_dealt)
                row.append(f"{statistics.fmean(found):.3f}, {max(found):.3f}")
            table.add_row(str(global_batch), str(replicas), *row)
    return table


def small_model(root: Path, topology: Topology) -> TrainedModel:
    """A policy of two million parameters with fresh weights."""
    shape = LlamaConfig(
        vocab_size=_VOCAB_SIZE, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(root)
    source = find_source(root, has_scalar_head=False, is_random=False, key="policy")
    precision = PrecisionConfig(dtype="bf16" if topology.device.torch_device.type == "cuda" else "fp32")
    return build_trained(
        "policy", source, False, precision, OptimizerConfig(lr=1e-4), topology, 0, TrainParallelConfig()
    )  # fmt: skip


def seconds(topology: Topology) -> float:
    """The clock of the first device."""
    if topology.device.torch_device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def layouts(topology: Topology) -> dict[str, Layout]:
    """What is compared, by name."""
    layout = partial(Layout, multiple_of=topology.row_multiple, device=topology.device.torch_device)
    by_number = {
        f"micro {micro}, {'packed' if packed else 'padded rows'}": layout(micro, packed)
        for packed in (False, True)
        for micro in (1, 4, 8)
        if packed or micro > 1
    }
    padded = {"tokens 4096, padded rows": layout(None, False, tokens=4096)}
    budgets = {f"tokens {n}, packed": layout(None, True, tokens=n) for n in (2048, 4096, 8192)}
    return {**by_number, **padded, **budgets}


def speed_table(demonstrations: Sequence[Demonstration], model: TrainedModel, num_rounds: int) -> Table:
    """The second table."""
    topology, total = model.topology, sum(len(d.response_ids) for d in demonstrations)
    real = sum(sum(lengths_of(one)) for one in demonstrations)
    best: dict[str, float] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for _ in range(num_rounds):
        for name, layout in layouts(topology).items():
            start = seconds(topology)
            microbatches = supervised_microbatches(demonstrations, total, layout)
            model.gradients(microbatches, SFT(Config()).loss, [])
            rate = real / (seconds(topology) - start)
            best[name] = max(best.get(name, 0.0), rate)
            positions = [m.batch.tokens_T.numel() for m in microbatches]
            sizes[name] = len(positions), max(positions)
    table = Table("micro-batches", "number", "largest, positions", "real tokens/s")
    for name, rate in best.items():
        table.add_row(name, str(sizes[name][0]), str(sizes[name][1]), f"{rate:,.0f}")
    return table


def pairs_of_one_prompt(num_prompt: int, num_response: int) -> list[PreferencePair]:
    """Four pairs of made tokens that answer one prompt, as the responses of a group do."""
    prompt = tuple(range(3, 3 + num_prompt))
    answers = [tuple(range(900 + 7 * n, 900 + 7 * n + num_response)) for n in range(8)]
    return [PreferencePair(str(n), prompt, answers[2 * n], answers[2 * n + 1], margin=0.0) for n in range(4)]


def prompts_table(pairs: Sequence[PreferencePair], model: TrainedModel, num_rounds: int) -> Table:
    """The third table."""
    topology, loss = model.topology, DPO(DpoConfig(beta=0.1)).loss
    plain = Layout(4, True, topology.row_multiple, topology.device.torch_device)
    sets = {
        f"{len(pairs)} real pairs": list(pairs),
        "8 responses of 128 to a prompt of 256": pairs_of_one_prompt(256, 128),
        "8 responses of 128 to a prompt of 1024": pairs_of_one_prompt(1024, 128),
    }
    table = Table("sequences", "a prompt", "positions", "GFLOP", "s", "of the first")
    for name, some in sets.items():
        best = [math.inf, math.inf]
        sizes = [(0, 0.0), (0, 0.0)]
        for _ in range(num_rounds):
            for is_shared in (False, True):
                start = seconds(topology)
                layout = replace(plain, shares_prompts=is_shared)
                microbatches = pair_microbatches(some, torch.zeros(len(some), 2), len(some), layout)
                model.gradients(microbatches, loss, [])
                best[is_shared] = min(best[is_shared], seconds(topology) - start)
                rows = [
                    m.batch.tokens_T if m.batch.shared is None else m.batch.shared.tokens_K
                    for m in microbatches
                ]
                sizes[is_shared] = sum(map(len, rows)), topology.work.take() / 1e9
        for which, how in enumerate(("with each response", "once")):
            num_positions, flops = sizes[which]
            ratio = best[which] / best[0]
            table.add_row(
                name, how, f"{num_positions:,}", f"{flops:,.1f}", f"{best[which]:.2f}", f"{ratio:.2f}"
            )
    return table


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path, help="gzipped pairs in the layout of ultrafeedback_binarized")
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--examples", type=int, default=64, help="of the optimizer step that is timed")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    console = Console()
    with tempfile.TemporaryDirectory() as folder, ranks(prepare(), ParallelConfig(), seed=0) as topology:
        root = Path(folder)
        train_tokenizer(texts_of(given.pairs), root / "tokenizer", _VOCAB_SIZE, byte_fallback=True)
        pairs = load_pairs(str(given.pairs), load_tokenizer(root / "tokenizer"), _LIMITS).items
        lengths = [length for pair in pairs for length in lengths_of(pair)]
        console.print(
            f"{len(pairs)} pairs; tokens of a sequence: mean {statistics.fmean(lengths):.0f}, median "
            f"{statistics.median(lengths):.0f}, longest {max(lengths)}"
        )
        console.print(balance_table(pairs, given.replicas))
        chosen = [Demonstration(p.id, p.prompt_ids, p.chosen_ids) for p in pairs[: given.examples]]
        model = small_model(root / "model", topology)
        topology.work.take()
        console.print(prompts_table(pairs[: given.examples], model, given.rounds))
        console.print(speed_table(chosen, model, given.rounds))


if __name__ == "__main__":
    main()
