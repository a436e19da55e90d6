"""A stage that starts from a converted checkpoint, and a run that is converted, equal those without the converter."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from convert.commands import convert
from engine.layouts import LAYOUTS
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from trainer.tiny_runs import configure, train, write_files

from rto_megatron.errors import ModelFolderError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("converted")
    write_files(root)
    for role in ("policy", "reward", "critic", "dpo"):
        convert("hf-to-megatron", root / "models" / role, root / "megatron" / role)
    return root


def _weights(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def _equal(one: Path, other: Path) -> bool:
    a, b = _weights(one), _weights(other)
    return a.keys() == b.keys() and all(torch.equal(b[n], t) for n, t in a.items())


def _runs(root: Path, stage: str, layout: str, **models: Path) -> Path:
    name = f"{stage}-{layout}-{'megatron' if models else 'hf'}"
    changes = {f"models__{role}": folder for role, folder in models.items()}
    config = configure(stage, root, root / "runs" / name, layout, **changes)
    if not config.run.dir.exists():
        assert set(run_ranks(LAYOUTS[layout][0], train, config)) == {None}
    return config.run.dir


@pytest.mark.parametrize("layout", ["one", pytest.param("tp2_pp2", marks=pytest.mark.slow)])
def test_rto_from_converted_models_is_bit_equal(root: Path, layout: str) -> None:
    roles = ("policy", "reward", "critic", "dpo")
    plain = _runs(root, "rto", layout)
    converted = _runs(root, "rto", layout, **{role: root / "megatron" / role for role in roles})
    assert _equal(plain / "hf", converted / "hf")


def test_a_reward_model_trained_from_a_converted_language_model_draws_its_own_head(root: Path) -> None:
    plain = _runs(root, "reward_model", "one")
    converted = _runs(root, "reward_model", "one", policy=root / "megatron/policy")
    assert _equal(plain / "hf", converted / "hf")


@pytest.mark.parametrize("layout", ["one", pytest.param("tp2_pp2", marks=pytest.mark.slow)])
def test_a_run_is_converted_to_what_it_exported(root: Path, tmp_path: Path, layout: str) -> None:
    run = _runs(root, "rto", layout)
    convert("megatron-to-hf", run, tmp_path / "policy")
    assert _equal(run / "hf", tmp_path / "policy")
    convert("megatron-to-hf", run, tmp_path / "critic", "--head", "scalar")
    assert "score.weight" in _weights(tmp_path / "critic")
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    convert("megatron-to-hf", checkpoint / "critic", tmp_path / "again")
    assert _equal(tmp_path / "critic", tmp_path / "again")


def test_a_tokenizer_that_is_not_the_converted_one_stops_the_stage(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "megatron/policy", tmp_path / "policy")
    path = tmp_path / "policy/hf/tokenizer.json"
    path.write_text(path.read_text().replace("fox", "fax"))
    config = configure("sft", root, tmp_path / "run", models__policy=tmp_path / "policy")
    (error,) = run_ranks(1, train, config)
    assert error is not None and "tokenizer.json changed: its sha256 is" in error


def test_a_config_that_is_not_the_trained_models_stops_the_stage(root: Path, tmp_path: Path) -> None:
    """No shape shows another epsilon; Megatron's arguments do."""
    shutil.copytree(root / "megatron/policy", tmp_path / "policy")
    path = tmp_path / "policy/hf/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))
    config = configure("sft", root, tmp_path / "run", models__policy=tmp_path / "policy")
    (error,) = run_ranks(1, train, config)
    assert error is not None and "norm_eps=0.001, trained with 1e-06" in error


def test_a_damaged_checkpoint_of_a_run_is_not_converted(root: Path, tmp_path: Path) -> None:
    checkpoint = sorted((_runs(root, "rto", "one") / "checkpoints").iterdir())[-1]
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    (file,) = (copy / "policy/weights").glob("__0_*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"\.distcp is not the file that was saved"):
        convert("megatron-to-hf", copy / "policy", tmp_path / "hf")


def test_the_report_of_a_conversion_does_not_outlive_training(root: Path, tmp_path: Path) -> None:
    """hf -> Megatron -> hf -> a stage -> Megatron: what was recorded of the first is not asked of the trained one."""
    convert("megatron-to-hf", root / "megatron/policy", tmp_path / "policy")
    config = configure("sft", root, tmp_path / "run", models__policy=tmp_path / "policy")
    assert run_ranks(1, train, config) == [None]
    convert("hf-to-megatron", tmp_path / "run/hf", tmp_path / "trained")
    assert not (tmp_path / "run/hf/conversion_report.json").exists()


def test_a_release_that_megatron_lm_trained_on_is_converted(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(root / "megatron/policy", folder)
    shutil.copytree(root / "megatron/dpo/release", folder / "iter_0000012")
    (folder / "latest_checkpointed_iteration.txt").write_text("12")
    convert("megatron-to-hf", folder, tmp_path / "hf")
    assert _equal(root / "models/dpo", tmp_path / "hf")
