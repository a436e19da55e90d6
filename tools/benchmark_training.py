#!/usr/bin/env python
"""A DPO step of this program beside one of TRL's DPOTrainer: one folder, one file of pairs, the same cores, in turn.

Usage: .venv/bin/python tools/benchmark_training.py [--pairs FILE] [--rounds 3] [--steps 6] [--batch 16]
           [--max-length 512] [--hidden 256] [--layers 4] [--vocab 8000] [--ours 2x1x4] [--trl 1x2x2] [--any-load]
           [--set batch.share_prompts=false]

FILE has rows as HuggingFaceH4/ultrafeedback_binarized; without it the synthetic task's pairs are taken. The first
rows that fit whole, as many as a step has pairs, are the data: every step of either peer reads the same tokens. The
model is a Llama of the stated size with random weights, in float32, and the reference is where it starts. Both peers
compute the reference's log-probs in every step, as both do by default.

Each peer is first tried with several ways to use the cores, and then runs its fastest one in alternating rounds. A
round is a process of its own; its figure is the median of its steps but the first. The table has the median of rounds,
the least and the greatest, and the ratio of each round. What other processes use of the cores is measured, and more
than a tenth of them ends the program: seconds of a shared machine compare nothing. --any-load goes on all the same.
"""

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from side_by_side import (
    Parts,
    Peer,
    Way,
    add_model_sizes,
    all_ways,
    compare,
    run_ranks,
    stated_llama,
    stated_way,
)

_ROOT = Path(__file__).parents[1]
_RECIPE = _ROOT / "launchers" / "recipes" / "quickstart" / "dpo.yaml"
_LEARNING_RATE, _BETA = 1e-5, 0.1
_WIDTH = 140  # columns


@dataclass(frozen=True)
class Work:
    """What both peers do."""

    root: Path
    pairs: Path
    steps: int
    batch: int
    max_length: int
    cores: int
    keys: tuple[str, ...] = ()  # further ones of this program's recipe

    @property
    def model(self) -> Path:
        """Weights and tokenizer."""
        return self.root / "model"


def ours(work: Work, way: Way, name: str) -> list[Parts]:
    """Steps of a run of this program."""
    folder = work.root / name
    keys = {
        "run.dir": folder,
        "run.steps": work.steps,
        "parallel.tensor": 1,
        "models.policy": work.model,
        "models.reference": work.model,
        "data.train": work.pairs,
        "data.eval": "null",
        "data.eval_samples": "null",
        "data.max_prompt_tokens": work.max_length // 2,
        "data.max_length": work.max_length,
        "batch.train": work.batch,
        "batch.micro": way.micro,
        "optimizer.lr": _LEARNING_RATE,
        "algorithm.beta": _BETA,
    }
    program = ["-m", "rto_megatron.cli.main", "train", str(_RECIPE), *(f"{k}={v}" for k, v in keys.items())]
    run_ranks([*program, *work.keys], way, folder.with_suffix(".log"))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{"step": json.loads(line)["time/step_s"]} for line in lines]


def trl(work: Work, way: Way, name: str) -> list[Parts]:
    """Steps of TRL's trainer."""
    folder = work.root / name
    folder.mkdir()
    arguments = [
        work.model,
        work.pairs,
        folder,
        work.steps,
        work.batch // way.processes,
        way.micro,
        work.max_length,
    ]
    run_ranks([__file__, "trl", *map(str, arguments)], way, folder.with_suffix(".log"))
    return [{"step": seconds} for seconds in json.loads((folder / "seconds.json").read_text())]


PEERS = {"ours": ours, "TRL": trl}


def trl_rank(
    model: Path, pairs: Path, out: Path, steps: int, batch: int, micro: int, max_length: int
) -> None:
    """One rank of TRL's trainer; `batch` pairs of it a step."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    seconds: list[float] = []

    class Clock(TrainerCallback):
        """Times steps with everything that is in them: batches, the reference, gradients, the optimizer."""

        last = 0.0

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.last = time.monotonic()

        def on_step_end(self, *_: object, **__: object) -> None:
            seconds.append(time.monotonic() - self.last)
            self.last = time.monotonic()

    rows = load_dataset("json", data_files=str(pairs), split="train", cache_dir=str(out / "cache"))
    config = DPOConfig(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        max_length=max_length,
        learning_rate=_LEARNING_RATE,
        beta=_BETA,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        ref_model=AutoModelForCausalLM.from_pretrained(model),
        args=config,
        train_dataset=rows.select_columns(["chosen", "rejected"]),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[Clock()],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        (out / "seconds.json").write_text(json.dumps(seconds))


def write_work(root: Path, given: argparse.Namespace) -> Work:
    """Pairs as plain JSON lines, and a model with a tokenizer of their words."""
    from transformers import LlamaForCausalLM

    from rto_megatron.data.synthetic import Sizes, write_synthetic_task
    from rto_megatron.data.tokenizer import train_tokenizer

    pairs, source = root / "pairs.jsonl", given.pairs
    if source is None:
        write_synthetic_task(root / "task", 0, Sizes(8, 8, 256, 8, 8, 8))
        source = root / "task" / "preferences_train.jsonl"
    text = gzip.decompress(source.read_bytes()).decode() if source.suffix == ".gz" else source.read_text()
    said = [turn["content"] for line in text.splitlines() for turn in json.loads(line)["chosen"]]
    train_tokenizer(said, root / "model", given.vocab, byte_fallback=True)
    _write_fitting(pairs, text.splitlines(), root / "model", given)
    LlamaForCausalLM(stated_llama(given, 2 * given.max_length)).save_pretrained(root / "model")
    return Work(root, pairs, given.steps, given.batch, given.max_length, given.cores, tuple(given.set))


def _write_fitting(pairs: Path, rows: list[str], tokenizer_folder: Path, given: argparse.Namespace) -> None:
    """The first rows of which neither peer cuts anything, one step's."""
    from rto_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    fitting, num_tokens = [], 0
    for row in rows:
        said = json.loads(row)
        turns = (said["chosen"], said["rejected"], said["chosen"][:-1])
        lengths = [
            len(tokenizer.apply_chat_template(turn, tokenize=True, return_dict=False)) for turn in turns
        ]
        if max(lengths) < given.max_length and lengths[2] < given.max_length // 2 - 8:
            fitting.append(row)
            num_tokens += lengths[0] + lengths[1]
        if len(fitting) == given.batch:
            break
    else:
        sys.exit(
            f"error: {len(fitting)} pairs fit into --max-length {given.max_length}, --batch wants {given.batch}"
        )
    pairs.write_text("\n".join(fitting) + "\n")
    print(f"{given.batch} pairs of {num_tokens} tokens a step")


def main() -> None:
    """Prints the table."""
    if sys.argv[1:2] == ["trl"]:
        model, pairs, out, *numbers = sys.argv[2:]
        trl_rank(Path(model), Path(pairs), Path(out), *map(int, numbers))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=Path, help="rows with `chosen` and `rejected` conversations, .gz or not"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of a round; the first is not counted")
    parser.add_argument("--batch", type=int, default=16, help="pairs of a step")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and answer")
    add_model_sizes(parser)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    for peer in PEERS:
        parser.add_argument(
            f"--{peer.lower()}",
            type=stated_way,
            metavar="2x1x4",
            help="its processes, threads, pairs a forward",
        )
    parser.add_argument(
        "--set", nargs="*", default=[], help="further keys of ours, as batch.share_prompts=false"
    )
    parser.add_argument("--any-load", action="store_true", help="measure on a machine that others use too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = write_work(Path(folder), given)
        peers = []
        for name, run in PEERS.items():
            stated: Way | None = getattr(given, name.lower())
            ways = all_ways(work.cores, work.batch) if stated is None else (stated,)
            peers.append(Peer(name, partial(run, work), ways))
        title = f"DPO, {work.batch} pairs a step"
        Console(width=_WIDTH).print(compare(peers, given.rounds, given.any_load, title))


if __name__ == "__main__":
    main()
