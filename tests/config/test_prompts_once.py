"""Where a prompt is computed once for all its responses, and what is said where it is not."""

from pathlib import Path

import pytest

from rto_megatron.config.load import load_recipe
from rto_megatron.config.prompts_once import has_shared_prompts, why_prompts_repeat

QUICKSTART = Path(__file__).parents[2] / "launchers" / "recipes" / "quickstart"


@pytest.mark.parametrize(
    ("recipe", "has"), [("dpo", True), ("reward_model", True), ("grpo", True), ("rto", False), ("sft", False)]
)
def test_pairs_and_groups_have_prompts_to_share(recipe: str, has: bool) -> None:
    assert has_shared_prompts(load_recipe(QUICKSTART / f"{recipe}.yaml")) is has


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ([], None),
        (["precision.dtype=fp32", "precision.kernels=transformer_engine"], None),
        (["batch.share_prompts=false"], "batch.share_prompts=false"),
        (["batch.packed=false"], "batch.packed=false"),
        (["parallel.context=2"], "parallel.context=2"),
        (["precision.dtype=bf16", "precision.kernels=transformer_engine"], "TransformerEngine"),
        (["models.moe_aux_loss_coef=0.01"], "moe_aux_loss_coef"),
    ],
)
def test_what_is_in_the_way_is_named(overrides: list[str], why: str | None) -> None:
    config = load_recipe(QUICKSTART / "dpo.yaml", overrides)
    said = why_prompts_repeat(config, config.precision.kernels)
    assert said is None if why is None else said is not None and why in said
