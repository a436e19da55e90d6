"""A checkpoint of one kind of layers loads strictly in the other, optimizer included, and training goes on."""

from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS
from fused.pairs import apart, numbers, trained_pair
from ranks import run_ranks
from stepping import take_step
from tiny_families import write_family
from tiny_models import SEQUENCES

from rto_megatron.algorithms.sft import SFT, Config
from rto_megatron.data.packing import Layout, supervised_microbatches
from rto_megatron.engine.checkpoint import begin_save, load_state
from rto_megatron.engine.megatron import TrainedModel
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


def _exchanged(layout: str, folder: Path, root: Path, is_sharded: bool) -> list[tuple[list[str], float]]:
    """In both directions: weights that did not arrive, and how far the next step leads apart."""
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
        _step(writer)
        _step(reader)
        moved = {name: (now - want[name]).norm() for name, now in _weights(writer).items()}
        assert min(moved.values()) > 0
        after, pairs = _weights(reader), _weights(writer)
        found.append((unlike, max(apart(after[name], pairs[name]) for name in want)))
    return found


@pytest.mark.parametrize(
    ("name", "layout", "is_sharded"),
    [
        ("llama", "one", False),
        ("qwen3", "tp2_sp", True),
        ("llama3_tied", "pp2", False),
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
            assert difference < 2**-6  # two roundings of a weight's bf16
