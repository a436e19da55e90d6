#!/usr/bin/env python
"""How a step of training grows: CPU seconds against the length of responses, vocabulary, responses, models and ranks.

Usage: .venv/bin/python tools/growth.py [--lengths 1024 2048 4096 8192 16384] [--vocabularies 2000 8000 32000]
           [--responses 16 32 64 128] [--ranks 1 2 4]

Steps are those of the real loop, one thread a rank; the pool is a script whose responses all have the stated length, so
that sampling costs next to nothing. What is told are CPU seconds of all ranks from one push to the next, of the second
step of a run: on a busy machine they hardly differ from those of a quiet one. The exponent is d log(seconds) / d
log(size) over all sizes (least squares) and between the last two, where fixed costs weigh least: 1 is linear, and
attention makes it up to 2 in length. Models are Llamas of one layer of 64. Models are counted by their passes, a
forward as 1 and an update as 3. On ranks, which share one batch, 0 is ideal. About four minutes of CPU time.
"""

import argparse
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table
from side_by_side import Way, run_ranks
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.utils import logging as transformers_logging

from rto_megatron.config.load import load_recipe
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.config.training import ParallelConfig
from rto_megatron.data.synthetic import Sizes, write_synthetic_task
from rto_megatron.generation.contract import Sampling
from rto_megatron.platform.device import prepare
from rto_megatron.proofs.resumed_runs import ScriptedPool, ScriptedPush
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.online import train_online
from rto_megatron.trainer.stages import ranks
from rto_megatron.types import Prompt, Rollout

_ROOT = Path(__file__).parents[1]
_RECIPES = _ROOT / "launchers" / "recipes" / "quickstart"
_SMALL = Sizes(demonstrations=8, eval_demonstrations=8, pairs=8, eval_pairs=8, prompts=256, eval_prompts=8)
_ROLES = ("policy", "reference", "reward", "critic", "dpo", "dpo_reference")
# Stage -> roles beside the policy, and its passes: forwards, and three for each model that is trained.
_MODELS: Mapping[str, tuple[tuple[str, ...], int]] = {
    "reinforce_pp": (("reference", "reward"), 3 + 3),
    "ppo": (("reference", "reward", "critic"), 4 + 6),
    "rto": (("reference", "reward", "critic", "dpo", "dpo_reference"), 6 + 6),
}


@dataclass(frozen=True)
class Point:
    """A run."""

    series: str
    size: int  # what the series varies
    stage: str = "rto"
    tokens: int = 256  # of a response
    vocabulary: int = 2000
    responses: int = 32
    num_ranks: int = 1


class ExactPool(ScriptedPool):
    """Responses of as many tokens as are asked for, drawn fast."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        draw = random.Random(version)
        return [
            Rollout(
                one.id,
                one.token_ids,
                tuple(draw.choices(range(3, self._vocab_size), k=sampling.max_tokens)),
                (-math.log(self._vocab_size),) * sampling.max_tokens,
                "length",
                version,
            )
            for one in prompts
        ]


class ClockedPush(ScriptedPush):
    """Notes this process's CPU seconds at every push, of which there is one before each step."""

    def __init__(self, pool: ScriptedPool | None) -> None:
        super().__init__(pool)
        self.read: list[float] = []

    def __call__(self, version: int) -> dict[str, float]:
        """See `ScriptedPush`."""
        self.read.append(time.process_time())
        return super().__call__(version)


def measure(root: Path, point: Point, name: str) -> float:
    """CPU seconds of this rank in the second step of a run."""
    roles, _ = _MODELS[point.stage]
    models = root / f"models-{point.vocabulary}"
    keys = [
        f"run.dir={root / name}",
        "run.steps=2",
        "run.samples_every=null",
        "parallel.tensor=1",
        *(f"models.{role}={models / role}" for role in ("policy", *roles)),
        *(["models.allow_unverified_reference=true"] if "dpo" in roles else []),
        f"data.train={root / 'task/prompts_train.jsonl'}",
        f"batch.rollout={point.responses}",
        f"batch.train={point.responses}",
        "batch.micro=2",
        f"sampling.max_response_tokens={point.tokens}",
        "rollout.logprob_gap_alarm=null",
    ]
    config = load_recipe(_RECIPES / f"{point.stage}.yaml", keys)
    assert isinstance(config, ReinforcementStage)
    with redirect_stdout(StringIO()), ranks(prepare(), ParallelConfig(), seed=0) as topology:
        pool = ExactPool(point.vocabulary) if topology.is_replica_lead else None
        push = ClockedPush(pool)
        train_online(config, topology, ConnectedPool(pool, push))
    return push.read[2] - push.read[1]


def write_models(root: Path, vocabulary: int, longest: int) -> None:
    """A folder for each role, with weights of its own and the task's tokenizer."""
    for number, role in enumerate(_ROLES):
        is_scalar = role in ("reward", "critic")
        kept = root / "task" / "models" / ("reward" if is_scalar else "policy")
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=2 * longest,
            initializer_range=0.02 + 0.001 * number,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        config.num_labels = 1
        folder = root / f"models-{vocabulary}" / role
        (LlamaForSequenceClassification if is_scalar else LlamaForCausalLM)(config).save_pretrained(folder)
        for file in kept.glob("tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())


def points_of(given: argparse.Namespace) -> list[Point]:
    """All runs."""
    return [
        *(Point("length", one, tokens=one, responses=2) for one in given.lengths),
        *(Point("vocabulary", one, vocabulary=one) for one in given.vocabularies),
        *(Point("responses", one, responses=one) for one in given.responses),
        *(Point("models", passes, stage) for stage, (_, passes) in _MODELS.items()),
        *(Point("ranks", one, responses=64, num_ranks=one) for one in given.ranks),
    ]


def child(root: Path, num_ranks: int) -> None:
    """One rank of all runs on so many."""
    transformers_logging.set_verbosity_error()
    points = [Point(**one) for one in json.loads((root / "points.json").read_text())]
    found = {
        number: measure(root, point, f"run-{number}")
        for number, point in enumerate(points)
        if point.num_ranks == num_ranks
    }
    (root / f"found-{num_ranks}-{os.environ['RANK']}.json").write_text(json.dumps(found))


def exponents(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Over all sizes by least squares, and between the last two."""
    x, y = [math.log(one) for one in sizes], [math.log(one) for one in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    last: Callable[[list[float]], float] = lambda values: values[-1] - values[-2]  # noqa: E731
    return over / sum((a - mean_x) ** 2 for a in x), last(y) / last(x)


def main() -> None:
    """Prints the table."""
    if sys.argv[1:2] == ["child"]:
        child(Path(sys.argv[2]), int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[2000, 8000, 32000])
    parser.add_argument("--responses", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    points = points_of(parser.parse_args())
    transformers_logging.disable_progress_bar()
    table = Table("against", "sizes", "CPU seconds of a step", "exponent", "of the last two")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_synthetic_task(root / "task", 0, _SMALL)
        for vocabulary in dict.fromkeys(point.vocabulary for point in points):
            write_models(root, vocabulary, max(point.tokens for point in points))
        (root / "points.json").write_text(json.dumps([asdict(point) for point in points]))
        seconds = [0.0] * len(points)
        for num_ranks in dict.fromkeys(point.num_ranks for point in points):
            program = [__file__, "child", str(root), str(num_ranks)]
            run_ranks(program, Way(num_ranks, 1, 2), root / f"{num_ranks}.log")
            for rank in range(num_ranks):
                found = json.loads((root / f"found-{num_ranks}-{rank}.json").read_text())
                for number, one in found.items():
                    seconds[int(number)] += one
    measured = zip(points, seconds, strict=True)
    for series, runs in itertools.groupby(measured, key=lambda pair: pair[0].series):
        sizes, taken = zip(*((point.size, one) for point, one in runs), strict=True)
        shown = [" ".join(map(str, sizes)), " ".join(f"{one:.2f}" for one in taken)]
        table.add_row(series, *shown, *(f"{one:.2f}" for one in exponents(sizes, taken)))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
