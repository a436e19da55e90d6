"""On one GPU: gradients of every stage's loss equal autograd's through Hugging Face; one Adam step is the formula."""

import math
from dataclasses import replace

import pytest
import torch
from gpu import oracle
from gpu.roles import HfModel, Prepared, gradient, master, task, trained, whole
from stepping import take_step
from torch import Tensor

from rto_megatron.config.training import OptimizerConfig
from rto_megatron.data.packing import Layout
from rto_megatron.engine.finite import PoisonedError
from rto_megatron.engine.megatron import TrainedModel
from rto_megatron.parallel.topology import Topology

pytestmark = pytest.mark.gpu
STAGES = ["sft", "dpo", "reward_model", "rto_policy", "rto_value"]
FP32 = 1e-3
BF16 = 0.05  # of the whole gradient, against the float32 oracle
LR = 1e-4


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_equal_autograd_through_hugging_face(
    stage: str, packed: bool, prepared: Prepared, place: Topology, layout: Layout, models: dict[str, HfModel]
) -> None:
    step = task(stage, prepared, place, replace(layout, packed=packed))
    model = prepared.roles.policy if step.role == "policy" else prepared.roles.critic
    metrics = model.gradients(step.microbatches, step.loss, step.names)
    want = oracle.gradients(models[step.role], step.microbatches, step.loss)
    errors = oracle.relative_errors(whole(model, gradient), want)
    print(f"{stage}: largest relative error {max(errors.values()):.1e}, norm {oracle.norm(want):.3f}")
    assert max(errors.values()) < FP32, errors
    assert all(math.isfinite(total) and count > 0 for total, count in metrics.values()), metrics


def test_recomputed_gradients_equal_autograd_through_hugging_face(
    prepared: Prepared, place: Topology, layout: Layout, models: dict[str, HfModel]
) -> None:
    step = task("rto_policy", prepared, place, layout)
    model = trained(place, models["policy"], recompute=True)
    model.gradients(step.microbatches, step.loss, step.names)
    want = oracle.gradients(models["policy"], step.microbatches, step.loss)
    assert max(oracle.relative_errors(whole(model, gradient), want).values()) < FP32


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_gradients_are_near_autograd_in_float32(
    stage: str, prepared: Prepared, place: Topology, layout: Layout, models: dict[str, HfModel]
) -> None:
    step = task(stage, prepared, place, layout)
    model = trained(place, models[step.role], dtype="bf16")
    model.gradients(step.microbatches, step.loss, step.names)
    want = oracle.gradients(models[step.role], step.microbatches, step.loss)
    error = oracle.total_error(whole(model, gradient), want)
    print(f"{stage}: relative error {error:.3f}")
    assert error < BF16


def _weights(model: TrainedModel) -> dict[str, Tensor]:
    return whole(model, lambda parameter: parameter)


def _first_adam_step(start: Tensor, grad: Tensor, config: OptimizerConfig, clip: float) -> Tensor:
    # Both moments are bias-corrected to g and g^2.
    clipped = grad.double() * clip
    return (start.double() - LR * clipped / (clipped.abs() + config.eps)).float()


@pytest.mark.parametrize("is_distributed", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["rto_policy", "rto_value"])
def test_one_adam_step_is_the_formula(
    stage: str,
    dtype: str,
    is_distributed: bool,
    prepared: Prepared,
    place: Topology,
    layout: Layout,
    models: dict[str, HfModel],
    is_deterministic: None,  # Adam's first step is the sign of the gradient: two passes must agree in every sign
) -> None:
    step = task(stage, prepared, place, layout)
    config = OptimizerConfig(lr=1.0, max_grad_norm=0.1)  # the rate of the step counts, not this one
    model = trained(place, models[step.role], config, dtype, is_distributed)
    before = _weights(model)
    model.gradients(step.microbatches, step.loss, step.names)
    grads = whole(model, gradient)
    metrics = take_step(model, step.microbatches, step.loss, step.names, LR)
    total = oracle.norm(grads)
    assert metrics[f"{model.name}/grad_norm"] == (pytest.approx(total, rel=1e-4), 1.0)
    clip = 0.1 / (total + 1e-6)
    assert clip < 1

    masters = whole(model, master) if dtype == "bf16" else _weights(model)
    after = _weights(model)
    for name, start in before.items():
        assert masters[name].dtype == torch.float32
        torch.testing.assert_close(after[name], masters[name].to(after[name].dtype), atol=0, rtol=0)
        want = _first_adam_step(start, grads[name], config, clip)
        torch.testing.assert_close(masters[name], want, atol=3e-7, rtol=1e-6)
        assert not torch.equal(masters[name], start.float())
    if dtype == "bf16":  # most moves are too small for bf16: they must be kept in float32
        kept = sum(int((after[n] == before[n]).sum()) for n in before)
        moved = sum(int((masters[n] != before[n].float()).sum()) for n in before)
        print(f"{kept} bf16 weights stayed, {moved} float32 masters moved")
        assert any(not torch.equal(after[n], before[n]) for n in before)


def test_a_nan_names_its_sample_and_changes_no_weight(
    prepared: Prepared, place: Topology, layout: Layout, models: dict[str, HfModel]
) -> None:
    step = task("rto_policy", prepared, place, layout)
    model = trained(place, models["policy"])
    before = _weights(model)
    advantages_T = step.microbatches[1].advantages_T.clone()
    advantages_T[step.microbatches[1].weight_T > 0] = float("nan")
    broken = [*step.microbatches]
    broken[1] = replace(broken[1], advantages_T=advantages_T)
    with pytest.raises(PoisonedError, match=rf"NaN or infinite on \d+ samples, \['{step.names[1][0]}'"):
        take_step(model, broken, step.loss, step.names, LR)
    assert all(torch.equal(tensor, before[name]) for name, tensor in _weights(model).items())
