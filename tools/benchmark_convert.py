#!/usr/bin/env python
"""Speed and memory of the converter beside `cp` of the same bytes on the same disk, in one run.

Usage: .venv/bin/python tools/benchmark_convert.py FOLDER [--gigabytes 1 2 4] [--rounds 3]

FOLDER needs four times the largest size. Every measurement begins with the source in the page cache and ends when the
written files are on the disk (fsync). Each conversion is a process of its own, timed from its plan on; its anonymous
memory (RssAnon: pages of mapped files are not in it; torch and the other packages take over 400 MB of it) is sampled
while it converts. A virtual machine gives freed pages back to its host and waits for them when it needs them again; so
right before each measurement a file of the same size is written and removed.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rto_megatron.convert.conversion import Proofs, convert_to_hf, convert_to_megatron, silent
from rto_megatron.convert.conversion_options import Options
from rto_megatron.convert.megatron_source import open_megatron
from rto_megatron.models.config_files import config_of
from rto_megatron.models.parameters import hf_shapes, num_parameters, stored_parameters
from rto_megatron.models.shape import ModelShape
from rto_megatron.storage.hf_writer import HfWriter

_HIDDEN, _FFN, _HEADS, _KV_HEADS, _VOCABULARY = 2048, 8192, 32, 8, 32000
_FILE_BYTES = 1 << 30
_SAMPLE_SECONDS = 0.01


def _shape(gigabytes: float) -> ModelShape:
    def of(layers: int) -> ModelShape:
        return ModelShape(
            "llama", layers, _HIDDEN, _FFN, _HEADS, _KV_HEADS, _HIDDEN // _HEADS, _VOCABULARY, 4096, 1e-5, 10000.0,
            None, False, 0.02,
        )  # fmt: skip

    ends, one = num_parameters(of(0), False), num_parameters(of(1), False)
    return of(max(1, round((gigabytes * 1e9 / 2 - ends) / (one - ends))))


def _write_model(folder: Path, shape: ModelShape) -> int:
    """A bfloat16 model of random numbers; returns its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape, False, "bfloat16")))
    named = hf_shapes(stored_parameters(shape, False))
    writer = HfWriter(folder, {n: (torch.bfloat16, s) for n, s in named.items()}, _FILE_BYTES)
    generator = torch.Generator().manual_seed(0)
    for name, size in named.items():
        writer.write(name, torch.randn(size, generator=generator).to(torch.bfloat16))
    writer.finish()
    return 2 * num_parameters(shape, False)


def _convert(direction: str, source: Path, target: Path, digest: bool) -> None:
    """What the measured process does: prints when it begins and the seconds that it took."""
    options, proofs = Options(None, _FILE_BYTES, None), Proofs(digest, None)
    opened = open_megatron(source, None, None) if direction == "megatron-to-hf" else None
    _prime(source)
    print("begin", flush=True)
    start = time.monotonic()
    if opened is None:
        convert_to_megatron(source, target, options, proofs, silent, dry_run=False)
    else:
        convert_to_hf(opened, target, options, proofs, silent, dry_run=False)
    print(time.monotonic() - start, flush=True)


def _anonymous(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def _measured(direction: str, source: Path, target: Path, digest: bool) -> tuple[float, float]:
    """Seconds of a conversion, and the process's anonymous memory at its highest, in bytes."""
    command = [sys.executable, __file__, str(target), "--child", direction, str(source)]
    child = subprocess.Popen([*command, *(["--digest"] if digest else [])], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "begin\n"
    peak = _anonymous(child.pid)
    while child.poll() is None:
        peak = max(peak, _anonymous(child.pid))
        time.sleep(_SAMPLE_SECONDS)
    return float(child.stdout.read()), peak


def _copied(source: Path, target: Path) -> float:
    _prime(source)
    start = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.rglob("*"):
        opened = os.open(path, os.O_RDONLY)
        os.fsync(opened)
        os.close(opened)
    return time.monotonic() - start


def _prime(source: Path) -> None:
    """Has the kernel hold as many free pages as a copy of `source` takes."""
    path = source.with_name("prime")
    with path.open("wb") as file:
        for _ in range(sum(p.stat().st_size for p in source.rglob("*")) >> 20):
            file.write(bytes(1 << 20))
    path.unlink()


def _warm(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def _benchmark(folder: Path, sizes: list[float], rounds: int) -> None:
    table = Table(title=f"median of {rounds} rounds, alternating; GB/s of weights, fsync included")
    for name in (
        "GB",
        "direction",
        "cp",
        "convert",
        "of cp",
        "with proof",
        "of cp",
        "peak anonymous MB (with proof)",
    ):
        table.add_column(name, justify="right")
    for size in sizes:
        model, megatron, copy, out = (folder / n for n in ("hf", "megatron", "copy", "out"))
        nbytes = _write_model(model, _shape(size))
        _measured("hf-to-megatron", model, megatron, digest=False)
        for direction, source in (("hf-to-megatron", model), ("megatron-to-hf", megatron)):
            seconds: dict[str, list[float]] = {"cp": [], "plain": [], "proved": []}
            memory: dict[str, float] = {"plain": 0.0, "proved": 0.0}
            for _ in range(rounds):
                _warm(source)
                seconds["cp"].append(_copied(source, copy))
                shutil.rmtree(copy)
                for kind in ("plain", "proved"):
                    _warm(source)
                    took, anonymous = _measured(direction, source, out, kind == "proved")
                    seconds[kind].append(took)
                    memory[kind] = max(memory[kind], anonymous)
                    shutil.rmtree(out)
            rate = {kind: nbytes / 1e9 / statistics.median(took) for kind, took in seconds.items()}
            table.add_row(
                f"{nbytes / 1e9:.2f}", direction, f"{rate['cp']:.2f}",
                f"{rate['plain']:.2f}", f"{rate['plain'] / rate['cp']:.2f}",
                f"{rate['proved']:.2f}", f"{rate['proved'] / rate['cp']:.2f}",
                f"{memory['plain'] / 1e6:.0f} ({memory['proved'] / 1e6:.0f})",
            )  # fmt: skip
            Console(width=140).print(table)
        shutil.rmtree(folder)


def main() -> None:
    """Runs the benchmark, or as a child one conversion of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="new folder to work in; removed at the end")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 2, 4], help="sizes of the models")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind")
    parser.add_argument("--child", nargs=2, metavar=("DIRECTION", "SOURCE"), help=argparse.SUPPRESS)
    parser.add_argument("--digest", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _convert(arguments.child[0], Path(arguments.child[1]), arguments.folder, arguments.digest)
        return
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists; name a new folder")
    _benchmark(arguments.folder, arguments.gigabytes, arguments.rounds)


if __name__ == "__main__":
    main()
