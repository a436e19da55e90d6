"""Checkpoints of mixtures load wherever their experts lie, with the optimizer; those from before, too.

`expert_runs_9fce306.tar.xz` holds two runs of that commit, `plain` (one rank) and `sharded` (two replicas with the
distributed optimizer): a checkpoint after two Adam steps on DATA, and the weights after a third one.
"""

import tarfile
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS, topology, trained
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from stepping import take_step
from torch import Tensor

from rto_megatron.algorithms.sft import SFT, Config
from rto_megatron.config.training import OptimizerConfig
from rto_megatron.data.packing import Layout, supervised_microbatches
from rto_megatron.engine.checkpoint import begin_save, load_state
from rto_megatron.engine.megatron import TrainedModel
from rto_megatron.engine.weights import stage_hf_tensors
from rto_megatron.types import Demonstration

RUNS = Path(__file__).with_name("expert_runs_9fce306.tar.xz")
DATA = [
    Demonstration("a", (5, 6, 7), (8, 9, 10, 11)),
    Demonstration("b", (12, 13), (14, 15, 2)),
    Demonstration("c", (20, 21, 22, 23), (24, 2)),
    Demonstration("d", (30,), (31, 32, 33, 34, 2)),
]
LR = 1e-2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two runs, and a model to start from, whose weights are the third step's."""
    root = tmp_path_factory.mktemp("runs")
    with tarfile.open(RUNS) as archive:
        archive.extractall(root, filter="data")
    model = root / "model"
    model.mkdir()
    weights = load_file(root / "plain/third_step.safetensors")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = root / "plain/checkpoints/step_000002/policy/hf/config.json"
    (model / "config.json").write_text(config.read_text())
    return root


def _step(model: TrainedModel) -> None:
    place = model.topology
    own = DATA[place.data_rank :: place.data_size]
    layout = Layout(1, True, place.row_multiple, place.device.torch_device)
    num_targets = sum(len(one.response_ids) for one in DATA)
    names = [[one.id] for one in own]
    take_step(model, supervised_microbatches(own, num_targets, layout), SFT(Config()).loss, names, LR)


def _continued(
    layout: str, model: Path, is_distributed: bool, saved: Path | None, run_dir: Path | None
) -> dict[str, Tensor]:
    """One step behind `saved`, or three with a checkpoint in `run_dir` before the last; the tensors of this rank."""
    place = topology(layout)
    adam = OptimizerConfig(lr=LR)
    policy = trained(place, model, False, adam, is_distributed_optimizer=is_distributed)
    if saved is not None:
        with torch.no_grad():
            for parameter in policy.module.parameters():
                parameter.fill_(0.5)
        load_state(saved, policy)
    if run_dir is not None:
        _step(policy)
        _step(policy)
        begin_save(run_dir, 2, {"policy": policy}, {"policy": model}, {}, keep=1).finish()
    _step(policy)
    tensors = stage_hf_tensors(policy.module, policy.shape, False, place)
    return {name: tensor.clone() for name, tensor in tensors}


def _weights(layout: str, *args: object) -> dict[str, Tensor]:
    parts = run_ranks(LAYOUTS[layout][0], _continued, layout, *args)
    names = [name for part in parts for name in part]
    assert len(names) == len(set(names)), "a tensor has two owners"
    return {name: tensor for part in parts for name, tensor in part.items()}


def _assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    apart = max(float((got[name] - want[name]).norm() / want[name].norm()) for name in want)
    print(f"apart {apart:.1e}")
    # A step of Adam moves each number by up to its rate, and without its moments by another part of it.
    assert apart < 1e-6


@pytest.mark.parametrize(("run", "layout"), [("plain", "one"), ("plain", "ep2"), ("sharded", "ep4_tp2")])
def test_runs_from_before_go_on(run: str, layout: str, runs: Path) -> None:
    saved = runs / run / "checkpoints/step_000002/policy"
    got = _weights(layout, runs / "model", run == "sharded", saved, None)
    _assert_close(got, load_file(runs / run / "third_step.safetensors"))


@pytest.mark.parametrize(
    ("saved_at", "loaded_at", "is_distributed"),
    [
        ("ep2", ("one", "ep4_tp2"), True),
        ("one", ("ep2_tp2",), True),
        ("ep2_pp2", ("one", "ep2"), False),
    ],
)
def test_training_goes_on_wherever_experts_lie(
    saved_at: str, loaded_at: tuple[str, ...], is_distributed: bool, runs: Path, tmp_path: Path
) -> None:
    want = _weights(saved_at, runs / "model", is_distributed, None, tmp_path)
    saved = tmp_path / "checkpoints/step_000002/policy"
    for layout in loaded_at:
        _assert_close(_weights(layout, runs / "model", is_distributed, saved, None), want)
