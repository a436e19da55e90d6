"""Leave out one patch at a time; print, as JSON, how a tiny training job with checkpoints fails without it.

Runs as a program of its own: the test process has every patch already, and patches are not undone.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import types
from collections.abc import Set
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_gpt
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from ranks import RankError, run_ranks
from tiny_gpt import Layout
from torch.distributed.checkpoint.api import CheckpointException

from rto_megatron.platform import cpu, safe_metadata, sync_save, torch_adam

ONE = Layout(distributed_optimizer=False)
SHARDED = Layout()
SPREAD = Layout(tp=2, bf16=True, overlap=True)
STAGES = Layout(pp=2)
MIXTURE = Layout(distributed_optimizer=False, experts=4)
EXPERTS_APART = Layout(distributed_optimizer=False, experts=4, ep=2)
EXPERTS_CUT = Layout(distributed_optimizer=False, experts=4, ep=2, etp=2)


def install_all_but(skip: Set[str]) -> None:
    """Apply every patch of the platform, less those named."""
    cpu.install(skip=skip)
    torch_adam.install(skip=skip)
    safe_metadata.install(skip=skip)
    if "W1" not in skip:
        sync_save.install()


def train(layout: Layout, skip: Set[str]) -> str:
    """Two optimizer steps."""
    install_all_but(skip)
    tiny_gpt.start(layout)
    trainee = tiny_gpt.build(layout)
    tiny_gpt.train_step(trainee, 0)
    tiny_gpt.train_step(trainee, 1)
    return "trained"


def resume(layout: Layout, skip: Set[str], num_steps_before: int, folder: Path) -> str:
    """Save, train on, load and train again: the weights must be the same both times."""
    install_all_but(skip)
    # A process that saving starts would import this program again, which takes seconds and shows nothing.
    sys.modules["__main__"] = types.ModuleType("__main__")
    tiny_gpt.start(layout)
    trainee = tiny_gpt.build(layout)
    for step in range(num_steps_before):
        tiny_gpt.train_step(trainee, step)
    torch_adam.prime_adam_state(trainee.optimizer)
    tiny_gpt.save(trainee, folder)
    assert not multiprocessing.active_children(), "saving started a process"
    for step in (7, 8):
        tiny_gpt.train_step(trainee, step)
    expected = tiny_gpt.weights(trainee)
    tiny_gpt.load(trainee, folder)
    for step in (7, 8):
        tiny_gpt.train_step(trainee, step)
    assert all(torch.equal(weight, expected[name]) for name, weight in tiny_gpt.weights(trainee).items()), (
        "resumed weights differ"
    )
    return "resumed"


def keep_the_generator(layout: Layout, skip: Set[str]) -> str:
    """A fork of the RNG tracker must leave the generator as it was and draw what its own seed gives."""
    install_all_but(skip)
    tiny_gpt.start(layout)
    tracker = get_cuda_rng_tracker()
    before = torch.get_rng_state()
    with tracker.fork():
        assert not torch.equal(torch.get_rng_state(), before), "the tracker's seed was ignored"
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before), "the generator was not restored"
    return "kept"


def poison(skip: Set[str], folder: Path) -> str:
    """Load a checkpoint whose pickles would create a file."""
    install_all_but(skip)
    tiny_gpt.start(ONE)
    trainee = tiny_gpt.build(ONE)
    torch_adam.prime_adam_state(trainee.optimizer)
    if folder.name == "metadata":
        tiny_gpt.save(trainee, folder)
        tiny_gpt.poison_metadata(folder, tiny_gpt.Touch(folder / "touched"))
    else:
        tiny_gpt.save(trainee, folder, extra=tiny_gpt.Touch(folder / "touched"))
        (folder / "touched").unlink(missing_ok=True)
    try:
        tiny_gpt.load(trainee, folder)
    except (AssertionError, CheckpointException) as failure:
        return f"{'ran' if (folder / 'touched').exists() else 'refused'}: {failure}"
    return "ran" if (folder / "touched").exists() else "loaded"


def outcome(world_size: int, scenario, *args) -> str:
    """What the scenario returned on rank 0, or the last lines of its failure."""
    try:
        return run_ranks(world_size, scenario, *args, timeout_seconds=60)[0]
    except RankError as failure:
        lines = str(failure).strip().splitlines()
        frames = [line.strip() for line in lines if "megatron/core" in line]
        return f"FAILED {frames[-1] if frames else ''} {lines[-1]}"


def main() -> None:
    """Print {patch: outcome}; the name "" stands for all patches in place."""
    root = Path(tempfile.mkdtemp())
    none: Set[str] = frozenset()
    print(
        json.dumps(
            {
                "train spread": outcome(2, train, SPREAD, none),
                "train stages": outcome(2, train, STAGES, none),
                "train mixture": outcome(1, train, MIXTURE, none),
                "train experts cut": outcome(4, train, EXPERTS_CUT, none),
                "resume sharded": outcome(2, resume, SHARDED, none, 2, root / "0"),
                "resume at 0": outcome(1, resume, ONE, none, 0, root / "1"),
                "generator": outcome(1, keep_the_generator, ONE, none),
                "P1": outcome(1, train, ONE, {"P1"}),
                "P2": outcome(2, train, STAGES, {"P2"}),
                "P3": outcome(1, train, SHARDED, {"P3"}),
                "P4": outcome(1, train, ONE, {"P4"}),
                "P5": outcome(1, train, ONE, {"P5"}),
                "P6": outcome(1, resume, SHARDED, {"P6"}, 1, root / "P6"),
                "P7": outcome(1, train, ONE, {"P7"}),
                "P8": outcome(1, keep_the_generator, ONE, {"P8"}),
                "P9": outcome(1, train, MIXTURE, {"P9"}),
                "P12": outcome(2, train, EXPERTS_APART, {"P12"}),
                "P13": outcome(4, train, EXPERTS_CUT, {"P13"}),
                "O1": outcome(1, resume, SHARDED, {"O1"}, 1, root / "O1"),
                "O2": outcome(1, resume, SHARDED, {"O2"}, 1, root / "O2"),
                "O3": outcome(1, resume, ONE, {"O3"}, 0, root / "O3"),
                "W1": outcome(1, resume, ONE, {"W1"}, 1, root / "W1"),
                "metadata": outcome(1, poison, none, root / "safe" / "metadata"),
                "bytes": outcome(1, poison, none, root / "safe" / "bytes"),
                "S1": outcome(1, poison, {"S1"}, root / "S1" / "metadata"),
                "S2": outcome(1, poison, {"S2"}, root / "S2" / "bytes"),
            }
        )
    )


if __name__ == "__main__":
    assert not torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    main()
