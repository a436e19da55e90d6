"""Ranks whose experts differ send every tensor once, bit for bit, and name them by one fingerprint."""

from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS, frozen, topology
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_families import write_family
from torch import Tensor

from rto_megatron.engine.holders import num_places, run_of
from rto_megatron.trainer.reference import weights_fingerprint
from rto_megatron.weight_sync.manifest import PieceSpec, uncut
from rto_megatron.weight_sync.policy_weights import PolicySource

FAMILY = "qwen2_moe"  # experts on different ranks beside one that every token passes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture."""
    folder = tmp_path_factory.mktemp("model")
    write_family(folder, FAMILY)
    return folder


def _sent(layout: str, model: Path) -> tuple[int, int, tuple[PieceSpec, ...], list[tuple[str, Tensor]], str]:
    """Run, place, specs and pieces of this rank, and the fingerprint."""
    policy = frozen(topology(layout), model, is_scalar=False)
    source = PolicySource(policy)
    pieces = [(name, piece.clone()) for name, piece in source.pieces(source.sender)]
    return run_of(policy.topology), source.sender, source.specs(), pieces, weights_fingerprint(policy)


@pytest.mark.parametrize(
    ("layout", "num_senders"),
    [("ep2_dp4", 2), ("ep2_tp2_etp2", 4), ("ep2_pp2", 4), ("ep2_pp2_v2", 4), ("pp3_uneven", 3)],
)
def test_pieces_of_all_senders_make_up_the_model(layout: str, num_senders: int, model: Path) -> None:
    want = load_file(model / "model.safetensors")
    ranks = run_ranks(LAYOUTS[layout][0], _sent, layout, model)
    (fingerprint,) = {fingerprint for *_, fingerprint in ranks}
    assert (fingerprint,) == tuple(one[-1] for one in run_ranks(1, _sent, "one", model))
    (specs,) = {specs for _, _, specs, _, _ in ranks}
    assert uncut(specs) == []
    for run in {run for run, *_ in ranks}:  # each of which a colocated pool reads from
        senders = {sender: pieces for own, sender, _, pieces, _ in ranks if own == run}
        assert senders.keys() == set(range(num_senders))
        filled = {name: torch.full_like(tensor, torch.nan) for name, tensor in want.items()}
        for sender, pieces in senders.items():
            own = [spec for spec in specs if spec.sender == sender]
            for spec, (name, piece) in zip(own, pieces, strict=True):
                assert spec.name == name
                filled[name].narrow(spec.dim, spec.start, spec.length).copy_(piece)
        assert [name for name in want if not torch.equal(filled[name], want[name])] == []


def _places(layout: str) -> int:
    return num_places(topology(layout))


def test_without_experts_apart_the_senders_are_a_replica() -> None:
    assert run_ranks(2, _places, "dp2") == [1, 1]
    assert run_ranks(2, _places, "tp2_sp") == [2, 2]
