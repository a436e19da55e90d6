"""The rates at which a run's optimizers step, against transformers' schedule; a model steps with those of its own."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from trainer.tiny_runs import configure, train
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from rto_megatron.reporting.metrics import read_metrics


def _transformers(lr: float, warmup: int, total: int) -> list[float]:
    """The rate of every optimizer step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, total, min_lr_rate=0.1)
    found = []
    for _ in range(total):
        found += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return found


def test_a_stage_on_data_steps_once_a_step(files: Path, tmp_path: Path) -> None:
    assert run_ranks(1, train, configure("sft", files, tmp_path, run__save_every=None)) == [None]
    found = [entry["lr"] for entry in read_metrics(tmp_path)]
    assert found == pytest.approx(_transformers(1e-3, warmup=2, total=4))


def test_a_stage_that_samples_steps_for_every_minibatch_of_every_pass(files: Path, tmp_path: Path) -> None:
    adam = {"lr": 5e-4, "warmup_fraction": 0.25}
    keys = {"run__steps": 2, "run__save_every": None, "algorithm__epochs": 2, "critic_optimizer": adam}
    assert run_ranks(1, train, configure("ppo", files, tmp_path, **keys)) == [None]
    # Eight responses in minibatches of four, twice: the fourth and the eighth step end a rollout step.
    for name, lr, warmup in (("lr/policy", 1e-3, 4), ("lr/critic", 5e-4, 2)):
        found = [entry[name] for entry in read_metrics(tmp_path)]
        assert found == pytest.approx(_transformers(lr, warmup, total=8)[3::4])
