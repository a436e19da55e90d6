"""`rto simulate` steps a recipe at its size, and judges it by a GPU's memory."""

import json
from pathlib import Path

import pytest
from tiny_models import llama_config
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.errors import RecipeError
from rto_megatron.planning.gpus import find_gpu

SFT = Path(__file__).parents[2] / "launchers/recipes/quickstart/sft.yaml"


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(llama_config().to_dict()))
    return tmp_path


def test_a_step_is_shown_by_phase(policy: Path) -> None:
    keys = [f"models.policy={policy}", "parallel.tensor=2", "data.max_length=64"]
    shown = CliRunner().invoke(app, ["simulate", str(SFT), *keys, "--gpus", "2"], catch_exceptions=False)
    said = " ".join(shown.output.split())
    # Half of four layers (128 x 256 for queries, keys and values, 128 x 128, 3 x 128 x 176), of embedding and head
    # (2 x 96 x 128), and nine norms of 128.
    layer = 128 * (2 * 128 + 2 * 64) + 3 * 128 * 176
    half = (4 * layer + 2 * 96 * 128) // 2 + 9 * 128
    assert f"policy │ 0 │ {half / 1e6:.1f} M" in said
    assert "allreduce over tensor" in said and "optimizer step" in said
    assert "name a GPU (--gpu h100) to have it judged." in said


@pytest.mark.parametrize("micro", [16, 1])
def test_the_host_waits_as_often_whatever_the_number_of_micro_batches(policy: Path, micro: int) -> None:
    keys = ["parallel.tensor=1", "data.max_length=64", "batch.train=16", f"batch.micro={micro}"]
    command = ["simulate", str(SFT), f"models.policy={policy}", *keys, "--gpus", "1"]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    update = next(line for line in shown.output.splitlines() if line.startswith("│ update"))
    # For the sums of all micro-batches, for whether their losses are finite, and for whether the gradients are.
    assert update.split("│")[7].strip() == "3"


def test_a_gpu_without_room_is_refused(policy: Path) -> None:
    keys = [
        f"models.policy={policy}",
        "parallel.tensor=1",
        "data.max_length=64",
        "--gpu",
        "1.001:1:1",
        "--gpus",
        "1",
    ]
    with pytest.raises(RecipeError, match=r"more than the 1\.0 MiB that a 1\.001:1:1 has"):
        CliRunner().invoke(app, ["simulate", str(SFT), *keys], catch_exceptions=False)


def test_an_unknown_gpu_is_told_how_to_be_described() -> None:
    with pytest.raises(RecipeError, match="as in --gpu 96:148:4000"):
        find_gpu("h1000")
    assert find_gpu("96:148:4000").tflops == 148
