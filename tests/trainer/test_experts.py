"""A mixture-of-experts policy through whole stages: checkpoint, resume, the next stage, balance in the metrics."""

import shutil
from pathlib import Path

import pytest
from engine.layouts import LAYOUTS
from models.test_mixtral import write_mixtral
from ranks import run_ranks
from trainer.test_resume import assert_equal_runs, cut_back
from trainer.tiny_runs import configure, train

from rto_megatron.reporting.metrics import read_metrics


@pytest.fixture(scope="module")
def mixtral(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral folder with the tokenizer of the other models."""
    folder = tmp_path_factory.mktemp("mixtral")
    write_mixtral(folder)
    shutil.copytree(files / "tokenizer", folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize("layout", ["tp2_sp", "ep2"])
def test_resumed_training_of_experts_equals_uninterrupted(
    layout: str, mixtral: Path, files: Path, tmp_path: Path
) -> None:
    keys = {"models__policy": mixtral, "models__moe_aux_loss_coef": 0.01}
    whole, resumed = (
        configure("sft", files, tmp_path / name, layout, **keys) for name in ("whole", "resumed")
    )
    assert run_ranks(2, train, whole) == [None] * 2
    cut_back(tmp_path / "whole", tmp_path / "resumed")
    assert run_ranks(2, train, resumed) == [None] * 2
    assert_equal_runs(tmp_path / "whole", tmp_path / "resumed")
    balances = [entry["loss/policy_moe_aux"] for entry in read_metrics(tmp_path / "whole")]
    assert all(1.0 <= balance < 4.0 for balance in balances)  # 1 is perfect balance, 4 one expert for all


@pytest.mark.parametrize(("layout", "roles"), [("one", {}), ("pp2_of_3", {"critic": {"ranks": "2"}})])
def test_rto_trains_the_experts_of_an_earlier_stage(
    layout: str, roles: dict[str, object], mixtral: Path, files: Path, tmp_path: Path
) -> None:
    sft = configure(
        "sft", files, tmp_path / "sft", models__policy=mixtral, run__steps=1, run__save_every=None
    )
    assert run_ranks(1, train, sft) == [None]
    keys = {f"models__{role}": tmp_path / "sft" for role in ("policy", "reference")}
    keys |= {"parallel__roles": roles}
    rto = configure(
        "rto", files, tmp_path / "rto", layout, run__steps=2, models__moe_aux_loss_coef=0.01, **keys
    )
    num_ranks = LAYOUTS[layout][0]
    assert run_ranks(num_ranks, train, rto) == [None] * num_ranks
    assert 1.0 <= read_metrics(tmp_path / "rto")[-1]["loss/policy_moe_aux"] < 4.0


def test_experts_over_tensor_ranks_need_sequence_parallelism(
    mixtral: Path, files: Path, tmp_path: Path
) -> None:
    config = configure("sft", files, tmp_path, "tp2", models__policy=mixtral)
    error = run_ranks(2, train, config)[0]
    assert error is not None and "models.policy has experts" in error and "parallel.sequence=true" in error


def test_layouts_of_experts_that_cannot_be_are_refused_together(
    mixtral: Path, files: Path, tmp_path: Path
) -> None:
    dense = configure("sft", files, tmp_path / "dense", "ep2")
    three = {"expert": 2, "roles": {"reference": {"tensor": 2, "expert": 2, "expert_tensor": 1}}}
    keys = {"models__policy": mixtral, "models__reference": mixtral, "parallel": three}
    mixture = configure("dpo", files, tmp_path / "mixture", **keys)
    (no_experts, *_), (unlike, *_) = run_ranks(2, train, dense), run_ranks(2, train, mixture)
    assert no_experts is not None and unlike is not None
    assert "parallel.expert=2 has no effect: no model of this layout (policy) has experts" in no_experts
    assert "models.reference has experts on different ranks" in unlike
    assert "set parallel.roles.reference.sequence=true" in unlike


def test_a_weight_of_the_balance_without_experts_is_refused(files: Path, tmp_path: Path) -> None:
    (error,) = run_ranks(1, train, configure("sft", files, tmp_path, models__moe_aux_loss_coef=0.01))
    assert error is not None and "no trained model has experts" in error
