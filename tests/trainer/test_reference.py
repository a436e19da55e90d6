"""A DPO model is used with the reference it was trained against, which is told by its weights wherever they lie."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS, frozen, topology
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_models import write_llama
from trainer.tiny_runs import configure, train

from rto_megatron.trainer.reference import weights_fingerprint
from rto_megatron.trainer.setup import REFERENCE_FINGERPRINT

VERIFIED = {"models__allow_unverified_reference": False}


def _fingerprint(layout: str, folder: Path, dtype: str = "fp32") -> str:
    return weights_fingerprint(frozen(topology(layout), folder, False, dtype))


def fingerprint(folder: Path, layout: str = "one", dtype: str = "fp32") -> str:
    """The fingerprint on which all ranks agree."""
    (agreed,) = set(run_ranks(LAYOUTS[layout][0], _fingerprint, layout, folder, dtype))
    return agreed


def run(stage: str, files: Path, run_dir: Path, layout: str = "one", **changes: object) -> str | None:
    """One step of a stage; the error for the user that every rank raised, if any."""
    config = configure(stage, files, run_dir, layout, run__steps=1, run__save_every=None, **changes)
    (answer,) = set(run_ranks(LAYOUTS[layout][0], train, config))
    return answer


@pytest.fixture(scope="module")
def trained(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `sft`, and `dpo` against its checkpoint."""
    root = tmp_path_factory.mktemp("trained")
    assert run("sft", files, root / "sft", optimizer__warmup_fraction=0.0) is None
    dpo = {"models__reference": root / "sft", "optimizer__warmup_fraction": 0.0}
    assert run("dpo", files, root / "dpo", **dpo) is None
    return root


def recorded(folder: Path) -> str | None:
    """What a model's config.json says of its reference."""
    return json.loads((folder / "config.json").read_text()).get(REFERENCE_FINGERPRINT)


def test_checkpoint_and_export_of_a_dpo_model_record_its_reference(trained: Path) -> None:
    want = fingerprint(trained / "sft")
    assert recorded(trained / "dpo/checkpoints/step_000001/policy/hf") == want
    assert recorded(trained / "dpo/hf") == want
    assert recorded(trained / "sft/hf") is None
    assert fingerprint(trained / "dpo") != want


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("dpo", "reference"), [("dpo", "sft"), ("dpo/hf", "sft/hf"), ("dpo", "sft/hf")])
def test_rto_accepts_the_reference_of_the_dpo_model_in_every_form(
    dpo: str, reference: str, dtype: str, trained: Path, files: Path, tmp_path: Path
) -> None:
    models = {"models__dpo": trained / dpo, "models__reference": trained / reference}
    assert run("rto", files, tmp_path / "run", precision__dtype=dtype, **models, **VERIFIED) is None


def test_a_dpo_model_trained_in_bf16_is_accepted_in_fp32(trained: Path, files: Path, tmp_path: Path) -> None:
    reference = {"models__reference": trained / "sft"}
    assert run("dpo", files, tmp_path / "dpo", precision__dtype="bf16", **reference) is None
    dpo = {"models__dpo": tmp_path / "dpo", **reference}
    assert run("rto", files, tmp_path / "run", **dpo, **VERIFIED) is None


def test_the_start_of_the_policy_stands_in_for_an_unnamed_reference(
    trained: Path, files: Path, tmp_path: Path
) -> None:
    models = {"models__policy": trained / "sft", "models__reference": None, "models__dpo": trained / "dpo"}
    assert run("rto", files, tmp_path / "run", **models, **VERIFIED) is None
    models["models__policy"] = files / "models/policy"
    error = run("rto", files, tmp_path / "other", **models, **VERIFIED)
    assert error is not None and f"models.reference={files / 'models/policy'} has" in error


@pytest.mark.parametrize("is_allowed", [False, True])
@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_another_reference_is_refused_by_name(
    layout: str, is_allowed: bool, trained: Path, files: Path, tmp_path: Path
) -> None:
    other = files / "models/reference"
    models = {"models__dpo": trained / "dpo", "models__reference": other}
    error = run(
        "rto", files, tmp_path / "run", layout, **models, models__allow_unverified_reference=is_allowed
    )
    assert error is not None
    folder = trained / "dpo/checkpoints/step_000001/policy/hf"
    own, found = fingerprint(trained / "sft")[:12], fingerprint(other)[:12]
    assert own != found
    assert f"the model in {folder} was trained against a reference with fingerprint {own}" in error
    assert f"models.reference={other} has {found}" in error
    assert "Name the model it started from as models.dpo_reference" in error
    assert not (tmp_path / "run/checkpoints").exists()


def test_the_right_reference_of_the_dpo_model_may_differ_from_that_of_the_policy(
    trained: Path, files: Path, tmp_path: Path
) -> None:
    models = {"models__dpo": trained / "dpo", "models__reference": files / "models/reference"}
    right, wrong = trained / "sft", files / "models/dpo"
    assert run("rto", files, tmp_path / "run", **models, models__dpo_reference=right, **VERIFIED) is None
    error = run("rto", files, tmp_path / "wrong", **models, models__dpo_reference=wrong, **VERIFIED)
    assert error is not None and f"models.dpo_reference={wrong} has" in error


def test_a_model_without_a_record_needs_an_allowance(files: Path, tmp_path: Path) -> None:
    error = run("rto", files, tmp_path / "run", **VERIFIED)
    assert error is not None
    assert f"{files / 'models/dpo'}/config.json does not say which reference" in error
    assert f"if it is models.reference={files / 'models/reference'}, set" in error
    assert "models.allow_unverified_reference=true" in error
    assert run("rto", files, tmp_path / "run", models__allow_unverified_reference=True) is None


@pytest.mark.parametrize("stage", ["simpo", "ppo"])
def test_a_model_trained_on_from_a_dpo_model_does_not_inherit_the_record(
    stage: str, trained: Path, files: Path, tmp_path: Path
) -> None:
    assert run(stage, files, tmp_path, models__policy=trained / "dpo") is None
    assert recorded(trained / "dpo/hf") is not None and recorded(tmp_path / "hf") is None


def test_a_run_does_not_go_on_against_other_weights_of_its_reference(files: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(files / "models/reference", reference)
    assert run("dpo", files, tmp_path / "run", models__reference=reference) is None
    weights = load_file(reference / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, reference / "model.safetensors", metadata={"format": "pt"})
    config = configure("dpo", files, tmp_path / "run", run__steps=2, models__reference=reference)
    (error,) = run_ranks(1, train, config)
    assert error is not None and "its weights changed; restore them or name another run.dir" in error


def test_a_stage_without_dpo_reward_asks_for_no_reference_of_it(files: Path, tmp_path: Path) -> None:
    assert run("rto", files, tmp_path / "run", algorithm__beta_dpo=0.0) is None


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_fingerprint_does_not_depend_on_layout_or_precision(is_tied: bool, tmp_path: Path) -> None:
    write_llama(tmp_path, is_tied=is_tied)
    want = fingerprint(tmp_path)
    for layout in ("tp2", "pp2", "dp2", "tp2_pp2"):
        assert fingerprint(tmp_path, layout) == want, layout
    assert fingerprint(tmp_path, "tp2", "bf16") == want


def test_a_fingerprint_sees_every_tensor(tmp_path: Path) -> None:
    write_llama(tmp_path / "model")
    prints = {fingerprint(tmp_path / "model")}
    tensors = load_file(tmp_path / "model/model.safetensors")
    names = (
        "model.embed_tokens.weight",
        "model.layers.3.mlp.down_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    )
    for name in names:
        moved = {key: tensor.clone() for key, tensor in tensors.items()}
        moved[name].view(-1)[-1] += torch.tensor(0.25)
        save_file(moved, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
        prints.add(fingerprint(tmp_path / "model"))
    assert len(prints) == 1 + len(names)
