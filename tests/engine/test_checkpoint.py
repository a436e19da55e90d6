"""Checkpoints load at any layout, are never overwritten, and damage is named without deleting anything."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS, topology, trained
from ranks import run_ranks
from safetensors.torch import load_file
from stepping import take_step
from tiny_families import write_family
from tiny_models import SEQUENCES, write_llama
from torch import Tensor

from rto_megatron.algorithms.sft import SFT, Config
from rto_megatron.config.training import OptimizerConfig, PrecisionConfig, TrainParallelConfig
from rto_megatron.data.packing import Layout, supervised_microbatches
from rto_megatron.engine.build_roles import build_trained
from rto_megatron.engine.checkpoint import begin_save, load_state, load_weights
from rto_megatron.engine.integrity import CheckpointError
from rto_megatron.engine.megatron import Model, TrainedModel
from rto_megatron.engine.recovery import Found, find_valid
from rto_megatron.engine.source import find_source
from rto_megatron.engine.weights import stage_hf_tensors
from rto_megatron.errors import UserError
from rto_megatron.models.build import build_chunks, transformer_config
from rto_megatron.types import Demonstration

ADAM = OptimizerConfig(lr=1e-3)
DATA = [Demonstration(str(i), tuple(ids[:p]), tuple(ids[p:])) for i, (ids, p) in enumerate(SEQUENCES)]
VOCAB = 97  # no multiple of a tensor size: rows of padding come and go


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """policy, tied, critic and another policy to overwrite."""
    root = tmp_path_factory.mktemp("models")
    write_llama(root / "policy", 7, VOCAB)
    write_llama(root / "tied", 8, VOCAB, is_tied=True)
    write_llama(root / "critic", 9, VOCAB, is_scalar=True)
    write_llama(root / "other", 10, VOCAB)
    return root


def _whole(model: Model) -> dict[str, Tensor]:
    place = model.topology
    tensors = dict(stage_hf_tensors(model.module, model.shape, model.has_scalar_head, place))
    is_reporter = place.tensor_rank == 0 and place.data_rank == 0
    return {name: tensor.clone() for name, tensor in tensors.items()} if is_reporter else {}


def _merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


def _assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def _save(layout: str, folders: Path, names: tuple[str, ...], run_dir: Path, steps: tuple[int, ...] = (1,)):
    place = topology(layout)
    models = {name: trained(place, folders / name, name == "critic", ADAM) for name in names}
    for step in steps:
        files = {name: folders / name for name in names}
        begin_save(run_dir, step, models, files, {"step": step, "note": [1, "x"]}, keep=2).finish()


def _load(layout: str, folders: Path, name: str, checkpoint: Path) -> dict[str, Tensor]:
    """Loads over the weights of another model."""
    place = topology(layout)
    model = trained(place, folders / ("critic" if name == "critic" else "other"), name == "critic", ADAM)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.fill_(0.5)
    load_weights(checkpoint / name, model)
    return _whole(model)


@pytest.fixture(scope="module")
def run_dir(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run saved at TP2 x PP2."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(4, _save, "tp2_pp2", folders, ("policy", "critic"), folder)
    return folder


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2_sp", "pp2"])
@pytest.mark.parametrize("name", ["policy", "critic"])
def test_weights_load_at_another_layout(layout: str, name: str, folders: Path, run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints/step_000001"
    got = _merged(run_ranks(LAYOUTS[layout][0], _load, layout, folders, name, checkpoint))
    _assert_same(got, load_file(folders / name / "model.safetensors"))


def test_norms_over_all_heads_are_cut_by_tensor_ranks_and_load_at_another_layout(tmp_path: Path) -> None:
    for name, seed in (("policy", 5), ("other", 6)):
        write_family(tmp_path / name, "olmo2", seed=seed)
    run_ranks(2, _save, "tp2", tmp_path, ("policy",), tmp_path)
    got = _merged(run_ranks(1, _load, "one", tmp_path, "policy", tmp_path / "checkpoints/step_000001"))
    _assert_same(got, load_file(tmp_path / "policy/model.safetensors"))


def _fresh(layout: str, path: Path, seed: int) -> dict[str, Tensor]:
    place = topology(layout)
    source = find_source(path, has_scalar_head=False, is_random=False, key="test")
    model = build_trained(
        "reward", source, True, PrecisionConfig(dtype="fp32"), ADAM, place, seed, TrainParallelConfig(),
        is_head_fresh=True,
    )  # fmt: skip
    return _whole(model)


def test_a_fresh_head_depends_on_the_seed_alone(folders: Path, tmp_path: Path) -> None:
    for name in ("policy", "tied"):
        shutil.copytree(folders / name, tmp_path / name / "models" / "policy")
        run_ranks(2, _save, "pp2", tmp_path / name / "models", ("policy",), tmp_path / name)
        (want,) = run_ranks(1, _fresh, "one", folders / name, 3)
        assert 0 < want["score.weight"].std() < 0.1
        for layout in ("one", "tp2_sp", "pp2"):
            _assert_same(_merged(run_ranks(LAYOUTS[layout][0], _fresh, layout, tmp_path / name, 3)), want)
    (other,) = run_ranks(1, _fresh, "one", tmp_path / "policy", 4)
    (first,) = run_ranks(1, _fresh, "one", tmp_path / "policy", 3)
    assert not torch.equal(other["score.weight"], first["score.weight"])


def _step(model: TrainedModel) -> None:
    place = model.topology
    own = DATA[place.data_rank :: place.data_size]
    layout = Layout(1, True, place.row_multiple, place.device.torch_device)
    tokens = sum(len(one.response_ids) for one in DATA)
    names = [[one.id] for one in own]
    take_step(model, supervised_microbatches(own, tokens, layout), SFT(Config()).loss, names, 1e-3)


def _train(
    layout: str, folders: Path, run_dir: Path, is_distributed: bool, is_loading: bool
) -> dict[str, Tensor]:
    place = topology(layout)
    start = folders / ("other" if is_loading else "policy")
    model = trained(place, start, False, ADAM, is_distributed_optimizer=is_distributed)
    if is_loading:
        load_state(run_dir / "checkpoints/step_000002/policy", model)
    else:
        _step(model)
        _step(model)
        begin_save(run_dir, 2, {"policy": model}, {"policy": start}, {}, keep=1).finish()
    _step(model)
    return _whole(model)


@pytest.mark.parametrize(
    ("saved_at", "loaded_at", "is_distributed"),
    [
        ("tp2_pp2", "one", False),
        ("dp2", "one", True),
        ("one", "dp2", True),
        ("cp2", "dp2", True),
        ("dp2", "cp2_gather", True),
    ],
)
def test_training_continues_at_another_layout(
    saved_at: str, loaded_at: str, is_distributed: bool, folders: Path, tmp_path: Path
) -> None:
    want = _merged(
        run_ranks(LAYOUTS[saved_at][0], _train, saved_at, folders, tmp_path, is_distributed, False)
    )
    got = _merged(
        run_ranks(LAYOUTS[loaded_at][0], _train, loaded_at, folders, tmp_path, is_distributed, True)
    )
    start = load_file(folders / "policy/model.safetensors")
    moved = torch.stack([(want[n] - start[n]).norm() for n in want]).norm()
    apart = torch.stack([(want[n] - got[n]).norm() for n in want]).norm()
    print(f"{saved_at} -> {loaded_at}: moved {moved:.3e}, apart {apart:.3e}")
    # Without the moments the third Adam step alone would be a third of the way.
    assert apart < 1e-3 * moved


def _find(run_dir: Path) -> Found | None:
    return find_valid(run_dir, topology("one"), takes_older=False)


def test_old_checkpoints_are_removed_and_none_is_overwritten(folders: Path, tmp_path: Path) -> None:
    run_ranks(1, _save, "one", folders, ("policy",), tmp_path, (1, 2, 10))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["latest", "step_000002", "step_000010"]
    (found,) = run_ranks(1, _find, tmp_path)
    assert found == Found(tmp_path / "checkpoints/step_000010", {"step": 10, "note": [1, "x"]}, ())
    before = _contents(tmp_path)

    def again() -> str:
        with pytest.raises(CheckpointError) as caught:
            _save("dp2", folders, ("policy",), tmp_path, (10,))
        return str(caught.value)

    for message in run_ranks(2, again):
        assert "step_000010" in message and "overwritten" in message
    assert _contents(tmp_path) == before


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _largest(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _cut_last_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    for at in range(len(content) // 4, len(content), len(content) // 64):
        content[at] ^= 0xFF
    file.write_bytes(content)


def _exchange(weights: Path) -> None:
    first, second, *_ = sorted(weights.glob("*.distcp"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing shard": lambda weights: _largest(weights).unlink(),
    "truncated shard": lambda weights: _truncate(_largest(weights)),
    "last byte of a shard": lambda weights: _cut_last_byte(_largest(weights)),
    "corrupt shard": lambda weights: _flip(_largest(weights)),
    "one bit of a shard": lambda weights: _flip_bit(_largest(weights)),
    "exchanged shards": _exchange,
    "empty shard": lambda weights: _largest(weights).write_bytes(b""),
    "no .metadata": lambda weights: (weights / ".metadata").unlink(),
    "truncated .metadata": lambda weights: _truncate(weights / ".metadata"),
    "no metadata.json": lambda weights: (weights / "metadata.json").unlink(),
    "truncated metadata.json": lambda weights: _truncate(weights / "metadata.json"),
    "one bit of config.json": lambda weights: _flip_bit(weights.parent / "hf/config.json"),
    "no manifest": lambda weights: (weights.parent.parent / "manifest.json").unlink(),
    "truncated manifest": lambda weights: _truncate(weights.parent.parent / "manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_kept(
    damage: str, folders: Path, run_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step_000001"
    DAMAGE[damage](checkpoint / "policy/weights")
    before = _contents(tmp_path)

    def load(is_trained: bool) -> str:
        place = topology("dp2")
        model = trained(place, folders / "other", False, ADAM)
        try:
            (load_state if is_trained else load_weights)(checkpoint / "policy", model)
        except UserError as error:
            return str(error)
        return "loaded"

    for message in (*run_ranks(2, load, True), *run_ranks(2, load, False)):
        assert str(checkpoint / ("" if "manifest" in damage else "policy")) in message
        # By the manifest, before a byte of `.metadata` is unpickled.
        assert re.search(
            "were saved|is not the file that was saved|manifest.json is missing|is missing or", message
        )
    print(damage, "->", message)
    assert _contents(tmp_path) == before


def test_a_checkpoint_of_another_model_is_refused(folders: Path, run_dir: Path) -> None:
    def load() -> str:
        model = trained(topology("one"), folders / "critic", True, ADAM)
        shape = replace(model.shape, num_layers=model.shape.num_layers + 2)
        config = transformer_config(shape, model.topology, torch.float32, recompute=False)
        deeper = replace(model, shape=shape, module=build_chunks(shape, config, model.topology, True))
        with pytest.raises(CheckpointError) as caught:
            load_weights(run_dir / "checkpoints/step_000001/critic", deeper)
        return str(caught.value)

    assert "of another model" in run_ranks(1, load)[0]
