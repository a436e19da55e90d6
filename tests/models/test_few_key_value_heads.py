"""Fewer key-value heads than tensor ranks: Megatron gives one head to several ranks, and every number stays."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.layouts import frozen, topology, trained
from ranks import run_ranks
from safetensors.torch import load_file
from stepping import take_step
from tiny_families import hugging_face_outputs, write_family
from tiny_models import SEQUENCES
from torch import Tensor

from rto_megatron.algorithms import sft
from rto_megatron.config.training import GridConfig, OptimizerConfig
from rto_megatron.data.packing import Layout, supervised_microbatches, token_batch
from rto_megatron.engine.weights import stage_hf_tensors, stage_pieces
from rto_megatron.models.config_files import read_shape
from rto_megatron.models.layout_checks import check_layout
from rto_megatron.parallel.topology import Topology
from rto_megatron.types import Demonstration
from rto_megatron.weight_sync.manifest import PieceSpec, uncut
from rto_megatron.weight_sync.policy_weights import PolicySource

SGD = OptimizerConfig(kind="sgd", lr=0.5, max_grad_norm=None)
# variant -> layout, key-value heads: biases over four ranks, norms of heads over four, one head over ranks of rows.
CASES = {"qwen2": ("tp4", 2), "qwen3": ("tp4", 2), "llama": ("tp2_cp2_sp", 1)}
Seen = dict[str, tuple[list[Tensor], list[str], dict[str, Tensor], tuple[PieceSpec, ...]]]


def _outputs(place: Topology, folder: Path) -> list[Tensor]:
    batch = token_batch(
        [(ids, 1) for ids, _ in SEQUENCES], True, place.row_multiple, place.device.torch_device
    )
    (values_T,) = frozen(place, folder, False).token_outputs([batch])
    ends = zip(batch.cu_seqlens, batch.last_positions, strict=False)
    return [values_T[start:last].clone() for start, last in ends]


def _read_and_step(layouts: Sequence[str], root: Path) -> Seen:
    """Variant -> outputs, tensors and pieces that differ from the file's, tensors after a step, a push's specs."""
    seen: Seen = {}
    for (name, _), layout in zip(CASES.items(), layouts, strict=True):
        place, stored = topology(layout), load_file(root / name / "model.safetensors")
        outputs = _outputs(place, root / name)
        model = trained(place, root / name, False, SGD)
        source, sizes = PolicySource(model), (model.module, model.shape, False, place)
        differing = [n for n, t in stage_hf_tensors(*sizes) if not torch.equal(t, stored[n])]
        own = [spec for spec in source.specs() if spec.sender == source.sender]
        if place.data_rank == 0:
            for spec, (piece_name, piece) in zip(own, stage_pieces(*sizes), strict=True):
                want = stored[spec.name].narrow(spec.dim, spec.start, spec.length)
                differing += [] if piece_name == spec.name and torch.equal(piece, want) else [str(spec)]
        rows = Layout(2, True, place.row_multiple, place.device.torch_device)
        all_of_them = [
            Demonstration(str(i), tuple(ids[:n]), tuple(ids[n:])) for i, (ids, n) in enumerate(SEQUENCES)
        ]
        num_targets = sum(len(one.response_ids) for one in all_of_them)
        microbatches = supervised_microbatches(all_of_them, num_targets, rows)
        take_step(model, microbatches, sft.SFT(sft.Config()).loss, [["x"]] * len(microbatches), SGD.lr)
        whole = {n: t.clone() for n, t in stage_hf_tensors(*sizes)}
        seen[name] = (outputs, differing, whole, source.specs())
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("few")
    for name, (_, heads) in CASES.items():
        write_family(root / name, name, num_key_value_heads=heads, num_hidden_layers=2)
    return root


def test_a_head_on_several_ranks_changes_no_number(root: Path) -> None:
    layouts = [layout for layout, _ in CASES.values()]
    (alone,), ranks = (
        run_ranks(count, _read_and_step, of, root) for count, of in ((1, ["one"] * len(CASES)), (4, layouts))
    )
    for name, (_, heads) in CASES.items():
        start = load_file(root / name / "model.safetensors")
        theirs = hugging_face_outputs(
            write_family(root / name, name, num_key_value_heads=heads, num_hidden_layers=2), SEQUENCES, False
        )
        assert uncut(ranks[0][name][3]) == []
        stepped = {n: t for rank in ranks for n, t in rank[name][2].items()}
        assert stepped.keys() == start.keys()
        for outputs, differing, _, specs in (rank[name] for rank in ranks):
            assert differing == [] and specs == ranks[0][name][3]
            assert max(float((o - t).abs().max()) for o, t in zip(outputs, theirs, strict=True)) < 1e-5
        want = alone[name][2]
        errors = {n: float((stepped[n] - t).norm() / (t - start[n]).norm()) for n, t in want.items()}
        print(name, f"{max(errors.values()):.1e}")
        assert max(errors.values()) < 1e-4, errors


def test_a_layout_without_equal_parts_is_refused_with_numbers(root: Path) -> None:
    shape = read_shape(root / "qwen3")  # 4 heads of 32, 2 of them for keys and values
    assert check_layout(shape, GridConfig(tensor=4), "models.policy") == []
    problems = check_layout(shape, GridConfig(tensor=3), "models.policy")
    (problem,) = check_layout(replace(shape, has_whole_qk_norm=True), GridConfig(tensor=4), "models.policy")
    assert (
        "tensor=4 is above num_key_value_heads=2, over all of which" in problem and "one of [1, 2]" in problem
    )
    assert problems[1] == (
        "models.policy: parallel.tensor=3 does not divide num_key_value_heads=2 and is no multiple of it; it can be "
        "one of [1, 2, 4]"
    )
