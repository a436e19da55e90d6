"""Products in 8 bits: what Megatron is told, how rows are padded, and where they are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.layouts import topology
from ranks import run_ranks
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.config.checks import find_problems
from rto_megatron.config.kl_gap import drowned_coefficients
from rto_megatron.config.load import load_recipe
from rto_megatron.config.training import FrozenPrecisionConfig, ParallelConfig
from rto_megatron.errors import RecipeError
from rto_megatron.models.build import transformer_config
from rto_megatron.models.layout_checks import check_fp8
from rto_megatron.planning.shapes import KNOWN_SHAPES
from rto_megatron.platform.cpu import CPU
from rto_megatron.platform.device import Device

DPO = Path(__file__).parents[2] / "launchers/recipes/llama3_8b/dpo.yaml"
KEYS = ("precision.kernels=transformer_engine", "precision.fp8=true")
EIGHT_BITS = FrozenPrecisionConfig(kernels="transformer_engine", fp8=True)


def _told() -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for has_fp8 in (True, False):
        device = Device(CPU, "gloo", "transformer_engine", has_fp8)
        place = replace(topology("one"), device=device, context_size=2)
        for dtype in (torch.bfloat16, torch.float32):
            config = transformer_config(KNOWN_SHAPES["llama-3-8b"], place, dtype, recompute=True)
            found.append((config.fp8, config.fp8_recipe, config.fp8_param, place.row_multiple))
    return found


def test_megatron_is_told_and_rows_are_padded_on_every_rank() -> None:
    (told,) = run_ranks(1, _told)
    # Models in float32 keep torch's layers; a row over two context ranks has 16 tokens on each.
    on, in_float32, off, _ = told
    assert on == ("hybrid", "tensorwise", False, 32)
    assert in_float32[0] is None and off[0] is None and off[3] == 2


def test_with_them_logits_may_be_fp32_and_the_residual_may_not() -> None:
    recipe = DPO.with_name("rto_fp8.yaml")
    config = load_recipe(recipe)
    assert config.precision.fp8 and config.precision.fp32_parts == ("head",)
    assert find_problems(config, 4, {}) == []
    said = " ".join(
        CliRunner().invoke(app, ["check", str(recipe), "--gpus", "8", "--gpu", "h100"]).output.split()
    )
    assert (
        "precision.fp8 │ layers of all roles multiply in 8 bits; head, attention and pool stay in bf16"
        in said
    )
    assert "precision.fp32_parts │ head: in fp32, of all roles and of the pool" in said
    (problem,) = find_problems(load_recipe(recipe, ["precision.fp32_parts=[head,residual]"]), 4, {})
    assert problem.endswith("set precision.kernels=torch and precision.fp8=false, or leave residual out")
    # What is warned of does not advise what is refused.
    wide = load_recipe(recipe, ["precision.fp32_parts=[]", "algorithm.beta_kl=0.25"])
    warned = drowned_coefficients(wide)
    assert warned and all(
        "in 8 bits the log-probs of pool and trainer differ by at least 0.046" in one for one in warned
    )
    assert all("set precision.fp32_parts=[head] (0.035 nats)" in one for one in warned)


def test_they_are_refused_without_the_kernels_and_for_gpus_without_them() -> None:
    (problem,) = find_problems(load_recipe(DPO, ["precision.fp8=true"]), 8, {})
    assert problem.endswith("set precision.kernels=transformer_engine, or precision.fp8=false")
    check = ["check", str(DPO), *KEYS, "--gpus", "8", "--gpu"]
    with pytest.raises(RecipeError, match=r"a a100 has no products in 8 bits; .* or take h100"):
        CliRunner().invoke(app, [*check, "a100"], catch_exceptions=False)
    assert CliRunner().invoke(app, [*check, "h200"], catch_exceptions=False).exit_code == 0


def test_sizes_that_are_no_multiples_are_refused_with_the_numbers() -> None:
    shape = replace(KNOWN_SHAPES["llama-3-8b"], ffn_hidden_size=14344)
    (problem,) = check_fp8({"policy": shape}, EIGHT_BITS, ParallelConfig(tensor=2))
    assert problem.startswith(
        "models.policy: intermediate_size=14344 over 2 tensor ranks are no multiple of 16"
    )
    (mixture,) = check_fp8({"policy": KNOWN_SHAPES["qwen3-30b-a3b"]}, EIGHT_BITS, ParallelConfig())
    assert "experts of a mixture" in mixture
    assert check_fp8({"policy": KNOWN_SHAPES["llama-3-8b"]}, EIGHT_BITS, ParallelConfig(tensor=8)) == []
    assert check_fp8({"policy": shape}, FrozenPrecisionConfig(), ParallelConfig()) == []
