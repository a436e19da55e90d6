"""Gradients are clipped by the definition, in place, and one number alone is read from the device."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from rto_megatron.platform.device import prepare

MAX_NORM = 0.5


class _Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def alone(tmp_path):
    prepare()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _clip(gradients: list[torch.Tensor]) -> tuple[float, Counter[str]]:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    weights = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    with _Calls() as calls:
        norm = get_grad_norm_fp32(gradients)
        clip_grad_by_total_norm_fp32(weights, MAX_NORM, norm)
    return norm, calls.seen


@pytest.mark.parametrize("size", [0.001, 1.0], ids=["below the limit", "above it"])
def test_clipping_is_its_definition(alone, size):
    generator = torch.Generator().manual_seed(0)
    gradients = [size * torch.randn(shape, generator=generator) for shape in ((3, 5), (7,), (), (2, 2, 2))]
    before = [gradient.clone() for gradient in gradients]
    norm, _ = _clip(gradients)
    expected = sum(float(number) ** 2 for gradient in before for number in gradient.flatten()) ** 0.5
    assert norm == pytest.approx(expected, rel=1e-6)
    factor = min(1.0, MAX_NORM / expected)
    for gradient, old in zip(gradients, before, strict=True):
        torch.testing.assert_close(gradient, old * factor, rtol=1e-5, atol=0.0)


def test_gradients_are_not_copied_and_one_number_is_read(alone):
    gradients = [torch.ones(4) for _ in range(20)]
    places = [gradient.data_ptr() for gradient in gradients]
    _, calls = _clip(gradients)
    assert [gradient.data_ptr() for gradient in gradients] == places
    assert all(float(gradient[0]) < 1.0 for gradient in gradients)
    assert calls["aten::_local_scalar_dense"] == 1
    assert not calls["aten::mul.Tensor"] and not calls["aten::copy_"]
