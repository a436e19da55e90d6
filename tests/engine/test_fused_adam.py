"""Adam in one kernel steps as torch's usual Adam does, and resumes from a checkpoint of either."""

from pathlib import Path

import pytest
import torch
from engine.layouts import topology, trained
from ranks import run_ranks
from tiny_models import write_llama
from torch import Tensor

from rto_megatron.config.training import OptimizerConfig
from rto_megatron.engine.checkpoint import begin_save, load_state
from rto_megatron.engine.megatron import TrainedModel

ADAM = OptimizerConfig(lr=1e-2, weight_decay=0.1)


def _step_plainly(model: TrainedModel) -> None:
    for group in model.optimizer.param_groups:
        group["fused"] = None


def _step(model: TrainedModel, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for buffer in model.gradient_buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    model.apply(lr=1e-2)


def _kinds(model: TrainedModel) -> set[bool | None]:
    return {group["fused"] for group in model.optimizer.param_groups}


def _runs(folder: Path, root: Path, dtype: str, is_sharded: bool) -> dict[str, list[Tensor]]:
    """Weights after three steps: of either kind, and of each that went on with the other's checkpoint of step two."""
    place, weights = topology("one"), {}
    for is_used in (False, True):
        model = trained(place, folder, False, ADAM, dtype, is_sharded)
        assert _kinds(model) == {True}
        if not is_used:
            _step_plainly(model)
        for number in range(3):
            if number == 2:
                (root / str(is_used)).mkdir()
                files = {"policy": folder}
                begin_save(root / str(is_used), 2, {"policy": model}, files, {}, keep=1).finish()
            _step(model, number)
        weights[f"straight {is_used}"] = [one.detach().float() for one in model.module.parameters()]
    for was_used in (True, False):
        model = trained(place, folder, False, ADAM, dtype, is_sharded)
        load_state(root / str(was_used) / "checkpoints/step_000002/policy", model)
        assert _kinds(model) == {True}
        _step(model, 2)
        weights[f"{was_used} then True"] = [one.detach().float() for one in model.module.parameters()]
    return weights


@pytest.mark.parametrize(("dtype", "is_sharded"), [("fp32", False), ("bf16", True)])
def test_adam_in_one_kernel_is_adam(dtype: str, is_sharded: bool, tmp_path: Path) -> None:
    write_llama(tmp_path / "model")
    (weights,) = run_ranks(1, _runs, tmp_path / "model", tmp_path, dtype, is_sharded)
    want = weights["straight False"]
    for name, got in weights.items():
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(
                one, other, rtol=1e-5 if dtype == "fp32" else 2**-7, atol=1e-6, msg=name
            )
    resumed = zip(weights["True then True"], weights["straight True"], strict=True)
    assert all(torch.equal(one, other) for one, other in resumed)
