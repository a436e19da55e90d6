"""KL coefficients that bf16 drowns, as `rto check` and `rto doctor` tell them."""

import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.config.kl_gap import drowned_coefficients, expected_gap
from rto_megatron.config.load import load_recipe
from rto_megatron.config.training import FrozenPrecisionConfig
from rto_megatron.diagnosis.recipe import check_precision

RECIPES = Path(__file__).parents[2] / "launchers" / "recipes"
RTO = RECIPES / "llama3_8b" / "rto.yaml"
WIDE = "precision.fp32_parts=[head,residual]"


def _warned(*overrides: str) -> list[str]:
    return drowned_coefficients(load_recipe(RTO, overrides))


def test_recipes_of_the_repository_are_not_warned_of() -> None:
    folder = RECIPES / "llama3_8b"
    warned = {path.name: drowned_coefficients(load_recipe(path, [])) for path in folder.glob("*.yaml")}
    assert {name: found for name, found in warned.items() if found} == {}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "algorithm.beta_kl=0.25",
            "a token a noise of 0.016, beside the 0.05 that algorithm.beta_dpo=0.05 pays",
        ),
        ("algorithm.beta_kl=0.25", "a noise of 0.52, beside a score"),
        ("algorithm.kl_target=0.005", "steered to by estimates that are 0.0021 nats too low"),
    ],
)
def test_what_is_drowned_is_told_in_nats(override: str, words: str) -> None:
    overrides = (override, "sampling.max_response_tokens=1024")
    (found,) = [one for one in _warned(*overrides) if words in one]
    assert found.startswith("in bf16 the log-probs of pool and trainer differ by about 0.046 nats a token")
    assert f"set {WIDE}" in found
    assert _warned(*overrides, "precision.dtype=fp32") == []
    assert not [one for one in _warned(*overrides, WIDE) if words in one]


def test_noise_of_a_response_is_that_of_a_sum_of_independent_tokens() -> None:
    gap = expected_gap(FrozenPrecisionConfig(dtype="bf16"))
    noise = math.sqrt(sum((0.25 * 1.4 * gap) ** 2 for _ in range(1024)))
    assert any(
        f"noise of {noise:.2g}," in one
        for one in _warned("algorithm.beta_kl=0.25", "sampling.max_response_tokens=1024")
    )


def test_check_and_doctor_tell_it() -> None:
    recipe, override = (
        str(RECIPES / "quickstart" / "rto.yaml"),
        ["precision.dtype=bf16", "algorithm.beta_kl=2"],
    )
    result = CliRunner().invoke(app, ["check", recipe, *override])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "warning: in bf16 the log-probs of pool and trainer differ by about 0.046 nats" in text
    findings = check_precision(load_recipe(Path(recipe), override))
    assert [one.level for one in findings] == ["warning"] * len(findings) and findings
