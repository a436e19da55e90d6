"""The task, data and models of one seed of the experiment."""

from pathlib import Path

from rto_megatron.data.synthetic import SIZES_LONG, write_synthetic_task
from rto_megatron.data.synthetic_source import LONG
from rto_megatron.experiments.lanes import Lane

HIDDEN_SIZE = 64


def make_models(lane: Lane, folder: Path, seed: int) -> None:
    """Writes the task, trains SFT, reward model and DPO, and evaluates what is no arm; what is there is kept."""
    if not (folder / "task" / ".complete").exists():
        write_synthetic_task(folder / "task", 1000 + seed, SIZES_LONG, LONG, HIDDEN_SIZE)
        (folder / "task" / ".complete").touch()
    for stage in ("sft", "reward_model", "dpo"):
        lane.learn(stage, folder, seed)
    for system in ("sft", "dpo"):
        lane.evaluate(system, folder)
