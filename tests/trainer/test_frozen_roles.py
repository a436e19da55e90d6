"""Two frozen roles with the same weights are one model, wherever the weights were loaded from."""

import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from trainer.test_options import exported
from trainer.tiny_runs import configure, join, train

from rto_megatron.config.schema import EvaluateStage, ReinforcementStage
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.frozen_roles import FrozenRoles
from rto_megatron.trainer.online import build_roles
from rto_megatron.trainer.setup import prepare_stage

ONE_STEP = {"run__steps": 1, "run__save_every": None}


def _copy(files: Path, folder: Path, change: float = 0.0) -> Path:
    """The reference in another folder, with other file contents for the same weights; one number is changed."""
    shutil.copytree(files / "models/reference", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += change
    save_file(
        dict(reversed(tensors.items())), folder / "model.safetensors", {"format": "pt", "made": "again"}
    )
    return folder


def _are_one(*configs: ReinforcementStage) -> list[bool]:
    """Whether the DPO reference is the reference; the DPO model, whose weights are others, never is."""
    found = []
    for config in configs:
        roles = build_roles(config, prepare_stage(config, join(config)))
        assert roles.dpo is not roles.reference
        found.append(roles.dpo_reference is roles.reference)
    return found


def test_weights_that_are_equal_are_held_once_and_others_are_not(files: Path, tmp_path: Path) -> None:
    twin = _copy(files, tmp_path / "twin")
    other = _copy(files, tmp_path / "other", change=1e-6)  # on one of the ranks, too little for bfloat16
    cases = [(twin, {}), (other, {}), (twin, {"dpo_reference": {"tensor": 2, "sequence": True}})]
    configs = [
        configure("rto", files, tmp_path / f"run{number}", "tp2", models__dpo_reference=named, parallel__roles=own)
        for number, (named, own) in enumerate(cases)
    ]  # fmt: skip
    assert run_ranks(2, _are_one, *configs) == [[True, False, False]] * 2


def _is_reference(*configs: EvaluateStage) -> list[bool]:
    """Whether an evaluated policy is its reference, whose KL is then 0 without a forward."""
    found = []
    for config in configs:
        setup = prepare_stage(config, join(config))
        frozen = FrozenRoles(setup, config.precision)
        found.append(frozen.place("policy") is frozen.place("reference"))
    return found


def test_an_evaluated_policy_may_be_its_reference(files: Path, tmp_path: Path) -> None:
    policy = files / "models/reference"
    configs = [
        EvaluateStage.model_validate(
            {
                "stage": "evaluate",
                "run": {"dir": tmp_path / f"run{change:g}"},
                "models": {"policy": policy, "reference": _copy(files, tmp_path / f"{change:g}", change)},
                "data": {"eval": str(files / "prompts.jsonl"), "max_prompt_tokens": 100},
                "sampling": {"max_response_tokens": 8},
                "evaluate": {"name": "SFT"},
            }
        )
        for change in (0.0, 0.5)
    ]
    assert run_ranks(1, _is_reference, *configs) == [[True, False]]


def _flops(run_dir: Path) -> float:
    (entry,) = read_metrics(run_dir)
    return entry["time/model_tflops"] * entry["time/step_s"]


def test_a_shared_model_is_asked_once_and_changes_nothing(
    files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said, folders = (
        {},
        {"plain": None, "twin": _copy(files, tmp_path / "a"), "other": files / "models/policy"},
    )
    for name, folder in folders.items():
        # Policy and reference are compared at another temperature than the DPO reward is of.
        keys = {"models__dpo_reference": folder, "sampling__temperature": 0.7}
        assert run_ranks(1, train, configure("rto", files, tmp_path / name, **ONE_STEP, **keys)) == [None]
        said[name] = capfd.readouterr().out
    assert "dpo_reference has the weights of reference" in said["twin"]
    assert "has the weights of" not in said["plain"] + said["other"]
    first, second = (exported(tmp_path / name / "hf") for name in ("plain", "twin"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    plain, twin, other = (_flops(tmp_path / name) for name in folders)
    # Five forwards, and three forwards' work for policy and critic each.
    assert twin == pytest.approx(plain) and twin / other == pytest.approx(11 / 12, abs=0.005)
