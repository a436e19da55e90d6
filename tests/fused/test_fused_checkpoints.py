"""A checkpoint of one kind of layers loads strictly in the other, optimizer included, and training goes on."""

from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS
from fused.pairs import numbers, trained_pair
from ranks import run_ranks
from stepping import take_step
from tiny_families import write_family
from tiny_models import SEQUENCES

from rto_megatron.algorithms.sft import SFT, Config
from rto_megatron.data.packing import Layout, supervised_microbatches
from rto_megatron.engine.checkpoint import begin_save, load_state
from rto_megatron.engine.megatron import TrainedModel
from rto_megatron.engine.weights import local_parameters
from rto_megatron.types import Demonstration

DATA = [Demonstration(str(i), tuple(ids[:p]), tuple(ids[p:])) for i, (ids, p) in enumerate(SEQUENCES)]


def _step(model: TrainedModel) -> None:
    place = model.topology
    own = DATA[place.data_rank :: place.data_size]
    layout = Layout(2, True, place.row_multiple, place.device.torch_device)
    micro = supervised_microbatches(own, sum(len(one.response_ids) for one in DATA), layout)
    take_step(model, micro, SFT(Config()).loss, [[one.id] for one in own], 1e-2)


def _weights(model: TrainedModel) -> dict[str, torch.Tensor]:
    return numbers(model, lambda parameter: parameter)


def _optimizer_state(model: TrainedModel) -> dict[str, list[torch.Tensor]]:
    """Of each parameter its float32 master, Adam's moments and its counter."""
    inner = [one.optimizer.state for one in model.optimizer.chained_optimizers]
    found = {}
    for name, parameter in local_parameters(model.module).items():
        (state,) = [one[parameter.main_param] for one in inner if parameter.main_param in one]
        found[name] = [parameter.main_param, state["exp_avg"], state["exp_avg_sq"], state["step"]]
    return found


def _norm(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([(one[name] - other[name]).norm() for name in one]).norm())


def _exchanged(layout: str, folder: Path, root: Path, is_sharded: bool) -> list[tuple[list[str], float]]:
    """In both directions: weights that did not arrive, and how far the next step leads apart, of its length."""
    found = []
    for direction in (1, -1):
        writer, reader = trained_pair(layout, folder, is_sharded=is_sharded)[::direction]
        _step(writer)
        run_dir = root / str(direction)
        run_dir.mkdir(exist_ok=True)
        begin_save(run_dir, 1, {"policy": writer}, {"policy": folder}, {}, keep=1).finish()
        load_state(run_dir / "checkpoints/step_000001/policy", reader)
        got, want = _weights(reader), _weights(writer)
        unlike = [name for name in want if not torch.equal(got[name], want[name])]
        if not is_sharded:  # else each has its own way to share the state out
            ours, theirs = _optimizer_state(reader), _optimizer_state(writer)
            assert all(float(one[-1]) == 1 for one in ours.values())
            unlike += [name for name in theirs if not all(map(torch.equal, ours[name], theirs[name]))]
        _step(writer)
        _step(reader)
        moved, after = _weights(writer), _weights(reader)
        apart, move = (_norm(one, other) for one, other in ((after, moved), (moved, want)))
        found.append((unlike, apart / move))
    return found


@pytest.mark.parametrize(
    ("name", "layout", "is_sharded"),
    [
        ("llama", "one", False),
        ("qwen3", "tp2_sp", True),
        ("llama3_tied", "pp2", False),
        ("qwen2_moe", "tp2_sp", False),
        ("qwen2_moe", "dp2", True),
        ("mixtral", "ep2", True),
    ],
)
def test_a_checkpoint_goes_on_with_the_other_layers(
    name: str, layout: str, is_sharded: bool, tmp_path: Path
) -> None:
    write_family(tmp_path / "model", name)
    for both in run_ranks(LAYOUTS[layout][0], _exchanged, layout, tmp_path / "model", tmp_path, is_sharded):
        for unlike, difference in both:
            assert unlike == []
            # A gradient that is all rounding moves a weight by the whole rate, in either direction.
            assert difference < 0.25
