"""Replicas whose experts exchange tokens run equally many passes, and what fills up their number changes nothing."""

from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS, topology
from ranks import run_ranks
from stepping import take_step
from tiny_families import write_family
from tiny_models import SEQUENCES
from torch import Tensor

from rto_megatron.algorithms import sft
from rto_megatron.config.training import OptimizerConfig, PrecisionConfig, TrainParallelConfig
from rto_megatron.data.packing import Layout, sequence_batches, supervised_microbatches
from rto_megatron.engine.build_roles import build_trained
from rto_megatron.engine.source import find_source
from rto_megatron.engine.weights import stage_hf_tensors
from rto_megatron.types import Demonstration, Metrics

SGD = OptimizerConfig(kind="sgd", lr=0.5, max_grad_norm=None)
DATA = [Demonstration(str(i), tuple(ids[:n]), tuple(ids[n:])) for i, (ids, n) in enumerate(SEQUENCES)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture."""
    folder = tmp_path_factory.mktemp("model")
    write_family(folder, "mixtral")
    return folder


def _uneven(
    layout: str, model: Path, recompute: bool, coef: float
) -> tuple[dict[str, Tensor], Metrics, list[Tensor]]:
    """A step in which replica 0 has one sequence and replica 1 the others, singly; then outputs of replica 1 alone."""
    place = topology(layout)
    source = find_source(model, False, is_random=False, key="test")
    precision = PrecisionConfig(dtype="fp32", recompute=recompute)
    policy = build_trained(
        "policy", source, False, precision, SGD, place, 1, TrainParallelConfig(), moe_aux_loss_coef=coef
    )
    rows = Layout(1, True, place.row_multiple, place.device.torch_device)
    own = DATA[:1] if place.data_rank == 0 else DATA[1:]
    targets = sum(len(one.response_ids) for one in DATA)
    microbatches = supervised_microbatches(own, targets, rows)
    metrics = take_step(policy, microbatches, sft.SFT(sft.Config()).loss, [["x"]] * len(own), SGD.lr)
    asked = sequence_batches(SEQUENCES, rows).batches if place.data_rank or not place.is_exchanging else []
    outputs = policy.token_outputs(asked)
    weights = {n: t.clone() for n, t in stage_hf_tensors(policy.module, policy.shape, False, place)}
    return weights, metrics, outputs


@pytest.mark.parametrize("recompute", [False, True])
def test_replicas_with_unlike_numbers_of_micro_batches_train_as_without_an_exchange(
    recompute: bool, model: Path
) -> None:
    def run(layout: str) -> tuple[dict[str, Tensor], list[Metrics], list[Tensor]]:
        parts = run_ranks(LAYOUTS[layout][0], _uneven, layout, model, recompute, 0.05)
        merged = {name: tensor for weights, _, _ in parts for name, tensor in weights.items()}
        return merged, [metrics for _, metrics, _ in parts], parts[1][2]

    (want, expected, said), (got, measured, heard) = run("dp2"), run("ep2")
    assert got.keys() == want.keys()
    apart = max(float((got[name] - want[name]).norm() / want[name].norm()) for name in want)
    print(f"apart {apart:.1e}")
    assert apart < 1e-6
    for one, other in zip(measured, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
    assert "loss/policy_moe_aux" in measured[0] and "router/policy_load/003" in measured[0]
    assert len(heard) == len(SEQUENCES)
    for ours, theirs in zip(heard, said, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
