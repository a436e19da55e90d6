#!/usr/bin/env python
"""How much of the shorter of sampling and training `rollout.ahead` hides: the real loop, and a pool that only waits.

Usage: .venv/bin/python tools/benchmark_overlap.py [--sample-s 1 3] [--ahead 0 1 2] [--steps 9]
           [--come at_once one_by_one]

The pool is a script that sleeps for the stated seconds before it answers a batch, as a pool on GPUs of its own would
leave the trainer's processors alone, and takes weights at once. Responses come at once, behind all seconds, or one by
one, evenly over them, so that the trainer scores those that are there. The trainer is real: one rank, critic-free, a
policy of a few hundred thousand parameters. Of means over the steps between the first and the last, from one push to
another:

    overlap = (sample + train - step) / min(sample, train)

with the pool's own seconds for a batch, those of scoring and updating, and those of the whole step, push included. 0:
they take turns. 1: the shorter one costs nothing. Takes about four minutes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.utils import logging as transformers_logging

from rto_megatron.config.load import load_recipe
from rto_megatron.config.overrides import as_override
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.config.training import ParallelConfig
from rto_megatron.data.synthetic import Sizes, write_synthetic_task
from rto_megatron.generation.contract import Arrived, Sampling
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.device import prepare
from rto_megatron.proofs.resumed_runs import ScriptedPool, ScriptedPush
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.online import train_online
from rto_megatron.trainer.stages import ranks
from rto_megatron.types import Prompt, Rollout

_RECIPE = Path(__file__).parents[1] / "launchers" / "recipes" / "quickstart" / "reinforce_pp.yaml"
_SMALL = Sizes(demonstrations=8, eval_demonstrations=8, pairs=8, eval_pairs=8, prompts=256, eval_prompts=8)


class SlowPool(ScriptedPool):
    """Answers a batch after the stated seconds."""

    def __init__(self, vocab_size: int, delay_s: float) -> None:
        super().__init__(vocab_size)
        self._delay_s = delay_s

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        drawn = super().generate(prompts, sampling, version)
        time.sleep(self._delay_s)
        return drawn


class StreamingPool(SlowPool):
    """Tells of the responses of a batch one by one, the last after the stated seconds."""

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, arrived: Arrived
    ) -> list[Rollout]:
        """See `StreamingEngine.stream`."""
        start = time.monotonic()
        drawn = ScriptedPool.generate(self, prompts, sampling, version)
        for place, rollout in enumerate(drawn):
            due = start + self._delay_s * (place + 1) / len(drawn)
            time.sleep(max(due - time.monotonic(), 0.0))
            arrived(place, rollout)
        return drawn


POOLS = {"at_once": SlowPool, "one_by_one": StreamingPool}


@dataclass(frozen=True)
class Overlap:
    """Means over the steps of one run, seconds."""

    sample: float
    train: float
    early: float  # share of the scoring that was done beside the sampling
    step: float
    waited: float

    @property
    def overlap(self) -> float:
        """The share of the shorter of sampling and training that the other hides."""
        return (self.sample + self.train - self.step) / min(self.sample, self.train)


def overlap_of(run_dir: Path, ahead: int) -> Overlap:
    """Means of a finished run, of whole turns of `ahead` steps in which the pool has a batch to sample."""
    entries = read_metrics(run_dir)
    turn = max(ahead, 1)
    whole = entries[1 : 1 + (len(entries) - 1 - ahead) // turn * turn]

    def mean(*names: str) -> float:
        return statistics.fmean(sum(entry[name] for name in names) for entry in whole)

    return Overlap(
        sample=mean("time/generate_s"),
        train=mean("time/score_early_s", "time/score_s", "time/update_s"),
        early=mean("time/score_early_s") / mean("time/score_early_s", "time/score_s"),
        step=mean("time/step_s"),
        waited=mean("time/pool_wait_s"),
    )


def write_models(task: Path) -> int:
    """Gives the task's folders weights, drawn at random; returns the size of their vocabulary."""
    for role, kind in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        folder = task / "models" / role
        shape = LlamaConfig.from_pretrained(folder, num_labels=1)
        kind(shape).save_pretrained(folder)
    return int(shape.vocab_size)


def measure(root: Path, topology: Topology, pool: SlowPool, ahead: int, steps: int, run_dir: Path) -> Overlap:
    """One run."""
    config = load_recipe(
        _RECIPE,
        [
            as_override("vars.root", root),
            as_override("run.dir", run_dir),
            as_override("models.policy", root / "task/models/policy"),
            as_override("models.reward", root / "task/models/reward"),
            *(
                f"run.steps={steps}",
                "run.samples_every=null",
                "parallel.tensor=1",
                "batch.rollout=128",
                "batch.micro=16",
            ),
            *(f"rollout.ahead={ahead}", "algorithm.pool_importance_cap=2", "rollout.logprob_gap_alarm=null"),
        ],
    )
    assert isinstance(config, ReinforcementStage)
    with redirect_stdout(StringIO()):
        train_online(config, topology, ConnectedPool(pool, ScriptedPush(pool)))
    return overlap_of(config.run.dir, ahead)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sample-s", type=float, nargs="+", default=[1.0, 3.0], help="seconds of a batch in the pool"
    )
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--come", nargs="+", default=[*POOLS], choices=POOLS, help="how responses come")
    parser.add_argument("--steps", type=int, default=9, help="of each run")
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    table = Table(
        "responses", "ahead", "sample, s", "train, s", "scored early", "step, s", "waited, s", "overlap"
    )
    with tempfile.TemporaryDirectory() as folder, ranks(prepare(), ParallelConfig(), seed=0) as topology:
        root = Path(folder)
        write_synthetic_task(root / "task", 0, _SMALL)
        vocab_size = write_models(root / "task")
        for delay_s, ahead, come in product(given.sample_s, given.ahead, given.come):
            pool, run_dir = POOLS[come](vocab_size, delay_s), root / f"{come}-ahead{ahead}-{delay_s:g}"
            found = measure(root, topology, pool, ahead, given.steps, run_dir)
            before, behind = (found.sample, found.train), (found.step, found.waited, found.overlap)
            shown = [
                *(f"{one:.2f}" for one in before),
                f"{found.early:.0%}",
                *(f"{one:.2f}" for one in behind),
            ]
            table.add_row(come, str(ahead), *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
