"""Interleaved and uneven pipelines: any number of micro-batches, checkpoints, and what Megatron's default would do."""

from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS, topology, trained
from megatron.core.transformer import TransformerConfig
from ranks import run_ranks
from stepping import take_step
from tiny_models import SEQUENCES, write_llama
from torch import Tensor

from rto_megatron.algorithms.sft import SFT, Config
from rto_megatron.config.training import OptimizerConfig
from rto_megatron.data.packing import Layout, sequence_batches, supervised_microbatches
from rto_megatron.engine.checkpoint import begin_save, load_state
from rto_megatron.engine.megatron import TrainedModel
from rto_megatron.engine.weights import stage_hf_tensors
from rto_megatron.types import Demonstration

SGD = OptimizerConfig(kind="sgd", lr=0.5, max_grad_norm=None)
ADAM = OptimizerConfig(lr=1e-2)
DATA = [Demonstration(str(i), tuple(ids[:n]), tuple(ids[n:])) for i, (ids, n) in enumerate(SEQUENCES)]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers; the output projection of the tied one is a copy of the embedding on the last stage."""
    folder = tmp_path_factory.mktemp("model")
    write_llama(folder, is_tied=bool(request.param))
    return folder


def _step(policy: TrainedModel, data: list[Demonstration], lr: float) -> None:
    place = policy.topology
    rows = Layout(1, True, place.row_multiple, place.device.torch_device)
    own = data[place.data_rank :: place.data_size]
    microbatches = supervised_microbatches(own, sum(len(one.response_ids) for one in data), rows)
    take_step(policy, microbatches, SFT(Config()).loss, [[one.id] for one in own], lr)


def _tensors(policy: TrainedModel) -> dict[str, Tensor]:
    tensors = stage_hf_tensors(policy.module, policy.shape, False, policy.topology)
    return {name: tensor.clone() for name, tensor in tensors}


def _merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = [name for part in parts for name in part]
    assert len(names) == len(set(names)), "a tensor has two owners"
    return {name: tensor for part in parts for name, tensor in part.items()}


def _apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).norm() / want[name].norm()) for name in want)


def _by_number(layout: str, folder: Path) -> tuple[list[dict[str, Tensor]], list[list[Tensor]]]:
    """Of 1, 2 and 3 micro-batches: the weights behind a step, and the log-probs before it."""
    place = topology(layout)
    policy = trained(place, folder, False, SGD)
    rows = Layout(1, True, place.row_multiple, place.device.torch_device)
    weights, logprobs = [], []
    for number in (1, 2, 3):
        batches = sequence_batches(SEQUENCES[:number], rows).batches
        logprobs.append([one.clone() for one in policy.token_outputs(batches)])
        _step(policy, DATA[:number], SGD.lr)
        weights.append(_tensors(policy))
    return weights, logprobs


def test_any_number_of_micro_batches_goes_through_interleaved_stages(model: Path) -> None:
    ((want, said),) = run_ranks(1, _by_number, "one", model)
    ranks = run_ranks(2, _by_number, "pp2_v2", model)
    steps = [_merged([weights[step] for weights, _ in ranks]) for step in range(3)]
    apart = [_apart(got, one) for got, one in zip(steps, want, strict=True)]
    print(f"apart {max(apart):.1e}")
    assert max(apart) < 1e-6
    for _, heard in ranks:
        assert [len(one) for one in heard] == [1, 2, 3]
        for ours, theirs in zip(heard, said, strict=True):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_gradients_may_go_off_while_chunks_still_run(model: Path) -> None:
    """Three sequences on each of two replicas, then one: the last micro-batch, behind which they go, is an empty one.

    Megatron reduces early from the second step on, when as many gradients have come as in the first.
    """

    def run(layout: str) -> dict[str, Tensor]:
        def step() -> dict[str, Tensor]:
            place = topology(layout)
            policy = trained(place, model, False, SGD, is_overlapped=place.data_size > 1)
            for data in ([*DATA, *DATA[:2]], DATA[:2], [*DATA[2:], *DATA]):
                _step(policy, data, SGD.lr)
            return _tensors(policy)

        return _merged(run_ranks(LAYOUTS[layout][0], step))

    assert _apart(run("pp2_v2_dp2"), run("one")) < 1e-6


def _squared_gradient(layout: str, folder: Path, is_default: bool) -> float:
    """Of this rank's parameters, from four sequences of one length; with Megatron's own way to exchange, or ours."""
    policy = trained(topology(layout), folder, False, SGD)
    if is_default:
        for name in ("overlap_p2p_comm", "batch_p2p_comm"):
            setattr(policy.module.config, name, TransformerConfig.__dataclass_fields__[name].default)
    rows = Layout(1, True, 1, policy.topology.device.torch_device)
    microbatches = supervised_microbatches([DATA[0]] * 4, 4 * len(DATA[0].response_ids), rows)
    policy.gradients(microbatches, SFT(Config()).loss, [["x"]] * 4)
    return sum(float(parameter.main_grad.square().sum()) for parameter in policy.module.parameters())


def test_megatrons_default_mixes_up_what_two_interleaved_stages_send_each_other(tmp_path: Path) -> None:
    """Where this fails, a newer Megatron may do without the settings of `models.build`: see if lengths may vary."""
    write_llama(tmp_path)

    def norm(layout: str, is_default: bool) -> float:
        return sum(run_ranks(LAYOUTS[layout][0], _squared_gradient, layout, tmp_path, is_default)) ** 0.5

    right = norm("one", False)
    assert norm("pp2_v2", False) == pytest.approx(right, rel=1e-6)
    assert abs(norm("pp2_v2", True) / right - 1) > 0.1


def _continued(
    layout: str, folder: Path, saved: Path | None, run_dir: Path | None, is_distributed: bool
) -> dict[str, Tensor]:
    """One Adam step behind `saved`, or three with a checkpoint in `run_dir` before the last."""
    policy = trained(topology(layout), folder, False, ADAM, is_distributed_optimizer=is_distributed)
    if saved is not None:
        with torch.no_grad():
            for parameter in policy.module.parameters():
                parameter.fill_(0.5)
        load_state(saved, policy)
    if run_dir is not None:
        _step(policy, DATA, ADAM.lr)
        _step(policy, DATA, ADAM.lr)
        begin_save(run_dir, 2, {"policy": policy}, {"policy": folder}, {}, keep=1).finish()
    _step(policy, DATA, ADAM.lr)
    return _tensors(policy)


@pytest.mark.parametrize(
    ("saved_at", "loaded_at", "is_distributed"),
    [
        ("pp2_v2", ("one", "pp2_uneven"), True),
        ("one", ("pp2_v2",), True),
        ("pp2_v2", ("pp3_uneven",), False),
        pytest.param("pp2_v2_dp2", ("one", "pp2_v2"), True, marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_whatever_chunks_there_are(
    saved_at: str, loaded_at: tuple[str, ...], is_distributed: bool, model: Path, tmp_path: Path
) -> None:
    def weights(layout: str, saved: Path | None, run_dir: Path | None) -> dict[str, Tensor]:
        num_ranks = LAYOUTS[layout][0]
        return _merged(run_ranks(num_ranks, _continued, layout, model, saved, run_dir, is_distributed))

    want = weights(saved_at, None, tmp_path)
    for layout in loaded_at:
        apart = _apart(weights(layout, tmp_path / "checkpoints/step_000002/policy", None), want)
        print(f"{saved_at} to {layout}: {apart:.1e}")
        # A step of Adam moves each number by up to its rate, and without its moments by another part of it.
        assert apart < 1e-6
