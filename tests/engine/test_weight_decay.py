"""Weight decay shrinks matrices, and leaves norms and biases alone, as OpenRLHF's groups of parameters do."""

from pathlib import Path

import pytest
import torch
from engine.layouts import topology, trained
from ranks import run_ranks
from tiny_families import write_family
from torch import Tensor

from rto_megatron.config.training import OptimizerConfig

LR, DECAY = 0.25, 0.5


def _step_without_gradient(folder: Path, dtype: str, is_sharded: bool) -> list[tuple[str, Tensor, Tensor]]:
    """Name, weight before and weight after of every parameter."""
    model = trained(
        topology("one"), folder, False, OptimizerConfig(lr=LR, weight_decay=DECAY), dtype, is_sharded
    )
    before = [one.detach().clone().float() for one in model.module.parameters()]
    for buffer in model.gradient_buffers():
        buffer.zero_()
    model.apply(lr=LR)
    named = model.module.named_parameters()
    return [(name, old, new.detach().float()) for (name, new), old in zip(named, before, strict=True)]


@pytest.mark.parametrize(("dtype", "is_sharded"), [("fp32", False), ("bf16", True)])
def test_norms_and_biases_do_not_decay(dtype: str, is_sharded: bool, tmp_path: Path) -> None:
    write_family(tmp_path / "model", "qwen2")  # whose projections have biases
    (seen,) = run_ranks(1, _step_without_gradient, tmp_path / "model", dtype, is_sharded)
    kinds = {"bias": 0, "norm": 0, "matrix": 0}
    for name, before, after in seen:
        kind = next((kind for kind in ("bias", "norm") if kind in name), "matrix")
        kinds[kind] += 1
        wanted = before * (1 - LR * DECAY) if kind == "matrix" else before
        torch.testing.assert_close(after, wanted, rtol=0 if kind != "matrix" else 2**-7, atol=0, msg=name)
    assert min(kinds.values()) > 0, kinds
