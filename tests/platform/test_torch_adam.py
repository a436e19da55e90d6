"""Training N steps, saving, and N more in another process equals 2 N steps, bit for bit."""

from pathlib import Path

import pytest
import tiny_gpt
import torch
from ranks import run_ranks
from tiny_gpt import Layout
from torch import Tensor

from rto_megatron.platform.torch_adam import prime_adam_state


def _train_and_save_halfway(layout: Layout, folder: Path) -> dict[str, Tensor]:
    tiny_gpt.start(layout)
    trainee = tiny_gpt.build(layout)
    for step in range(4):
        if step == 2:
            prime_adam_state(trainee.optimizer)
            tiny_gpt.save(trainee, folder)
        tiny_gpt.train_step(trainee, step)
    return tiny_gpt.weights(trainee)


def _load_and_finish(layout: Layout, folder: Path) -> dict[str, Tensor]:
    tiny_gpt.start(layout)
    trainee = tiny_gpt.build(layout)
    with torch.no_grad():
        for weight in trainee.model.parameters():
            weight.zero_()
    prime_adam_state(trainee.optimizer)
    tiny_gpt.load(trainee, folder)
    for step in (2, 3):
        tiny_gpt.train_step(trainee, step)
    return tiny_gpt.weights(trainee)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, Layout(distributed_optimizer=False)),
        (1, Layout(distributed_optimizer=False, bf16=True)),
        (1, Layout()),
        (2, Layout()),
        (2, Layout(tp=2, bf16=True)),
    ],
    ids=["fp32", "bf16", "sharded", "sharded-dp2", "sharded-bf16-tp2"],
)
def test_resumed_training_equals_uninterrupted_training(tmp_path, world_size, layout):
    straight = run_ranks(world_size, _train_and_save_halfway, layout, tmp_path)
    resumed = run_ranks(world_size, _load_and_finish, layout, tmp_path)
    for expected, found in zip(straight, resumed, strict=True):
        for name, weight in expected.items():
            assert torch.equal(found[name], weight), name


def _prime_twice(layout: Layout) -> list[list[str]]:
    tiny_gpt.start(layout)
    trainee = tiny_gpt.build(layout)
    prime_adam_state(trainee.optimizer)
    primed = [sorted(state) for state in trainee.optimizer.chained_optimizers[0].optimizer.state.values()]
    tiny_gpt.train_step(trainee, 0)
    prime_adam_state(trainee.optimizer)
    steps = {
        float(state["step"]) for state in trainee.optimizer.chained_optimizers[0].optimizer.state.values()
    }
    assert steps == {1.0}
    return primed


def test_priming_makes_adams_state_and_keeps_what_exists():
    (primed,) = run_ranks(1, _prime_twice, Layout())
    assert primed and all(keys == ["exp_avg", "exp_avg_sq", "step"] for keys in primed)
