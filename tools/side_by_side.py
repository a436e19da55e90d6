"""Peers in turn on one machine: how each uses the cores, and whether somebody else used them meanwhile."""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil
from rich.table import Table
from transformers import LlamaConfig

_MOST_OF_OTHERS = 0.1  # of the cores

type Parts = Mapping[str, float]  # seconds of a step by part, `step` is all of it


@dataclass(frozen=True)
class Way:
    """How a peer uses the cores; `micro` items (pairs, sequences) a forward."""

    processes: int
    threads: int
    micro: int

    def __str__(self) -> str:
        return f"{self.processes} x {self.threads} threads, {self.micro} a forward"


@dataclass(frozen=True)
class Peer:
    """Runs some steps as one process or several; `run` gets the way and a name for its folder."""

    name: str
    run: Callable[[Way, str], list[Parts]]
    ways: tuple[Way, ...]  # one: it is taken; several: they are tried first


def add_model_sizes(parser: argparse.ArgumentParser) -> None:
    """The arguments that `stated_llama` reads."""
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8000)


def stated_llama(given: argparse.Namespace, max_positions: int) -> LlamaConfig:
    """A Llama of the stated sizes, as a language model or with a scalar head."""
    config = LlamaConfig(
        vocab_size=given.vocab,
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 11 // 4 // 2 * 2,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 32,
        num_key_value_heads=given.hidden // 64,
        max_position_embeddings=max_positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config.num_labels = 1
    return config


def all_ways(cores: int, batch: int) -> tuple[Way, ...]:
    """Cores as threads or as processes, with forwards of few items and of as many as there are."""
    cuts = [(p, t) for p, t in dict.fromkeys([(1, cores), (cores, 1)]) if batch % p == 0]
    return tuple(
        Way(p, t, m) for p, t in cuts for m in dict.fromkeys((2, 4, batch // p)) if batch // p % m == 0
    )


def stated_way(text: str) -> Way:
    """What `2x1x4` says."""
    processes, threads, micro = map(int, text.split("x"))
    return Way(processes, threads, micro)


def run_ranks(
    program: Iterable[str], way: Way, log: Path, variables: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Runs a program by torchrun without GPUs; ends this program, with its last words, where it fails."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(way.processes)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment = {
        **inherited,
        **variables,
        "OMP_NUM_THREADS": str(way.threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as shown:
        command = [sys.executable, *ranks, *program]
        status = subprocess.run(command, env=environment, stdout=shown, stderr=shown, check=False).returncode
    if status:
        sys.exit(f"error: a peer ended with status {status}; its last words:\n{log.read_text()[-2000:]}")


def measured(peer: Peer, way: Way, name: str, is_any_load: bool) -> Parts:
    """Medians over the steps but the first; ends the program where others used the cores meanwhile."""
    before, started, own_before = _busy_s(), time.monotonic(), _own_s()
    steps = peer.run(way, name)
    wall, own = time.monotonic() - started, _own_s() - own_before
    others = max(0.0, _busy_s() - before - own) / (wall * (os.cpu_count() or 1))
    if others > _MOST_OF_OTHERS and not is_any_load:
        sys.exit(
            f"error: other processes used {others:.0%} of the cores while {peer.name} was measured, at most "
            f"{_MOST_OF_OTHERS:.0%} leaves seconds that mean something; end them, or give --any-load"
        )
    return {part: statistics.median(step[part] for step in steps[1:]) for part in steps[0]}


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice)


def _own_s() -> float:
    """CPU seconds of the processes that this one started: of those that ended, and of those that live, as a pool."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = psutil.Process().children(recursive=True)
    return used.ru_utime + used.ru_stime + sum(map(_spent_s, living))


def _spent_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)


def compare(peers: Iterable[Peer], num_rounds: int, is_any_load: bool, title: str) -> Table:
    """Tries every way of each peer that has several, then runs the fastest of each in turn.

    The table has medians over the rounds by part, the least and the greatest step, and of each round the seconds of
    each peer over those of the first.
    """
    best: dict[Peer, Way] = {}
    for index, peer in enumerate(peers):
        if len(peer.ways) == 1:
            (best[peer],) = peer.ways
            continue
        tried = {}
        for number, way in enumerate(peer.ways):
            tried[way] = measured(peer, way, f"try-{index}-{number}", is_any_load)["step"]
            print(f"{peer.name}, {way}: {tried[way]:.2f} s", flush=True)
        best[peer] = min(tried, key=tried.__getitem__)
    rounds: dict[Peer, list[Parts]] = {peer: [] for peer in best}
    for number in range(num_rounds):
        for index, (peer, way) in enumerate(best.items()):
            rounds[peer].append(measured(peer, way, f"round-{index}-{number}", is_any_load))
    return _table(best, rounds, title)


def _table(best: Mapping[Peer, Way], rounds: Mapping[Peer, list[Parts]], title: str) -> Table:
    first, *others = best
    parts = dict.fromkeys(part for found in rounds.values() for part in found[0])
    table = Table("peer", "cores used as", *parts, "least", "greatest", title=title)
    for peer, found in rounds.items():
        medians = [
            f"{statistics.median(one[part] for one in found):.2f}" if part in found[0] else ""
            for part in parts
        ]
        steps = [one["step"] for one in found]
        table.add_row(peer.name, str(best[peer]), *medians, f"{min(steps):.2f}", f"{max(steps):.2f}")
    ratios = [
        f"{peer.name} over {first.name}: "
        + ", ".join(
            f"{theirs['step'] / own['step']:.2f}"
            for own, theirs in zip(rounds[first], rounds[peer], strict=True)
        )
        for peer in others
    ]
    table.caption = f"seconds by round, {'; '.join(ratios)}"
    return table
