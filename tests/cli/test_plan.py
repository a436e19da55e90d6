"""`rto plan` finds layouts that fit, says how long they take, and what to do where none does."""

import json
import re
import shlex
from pathlib import Path

import pytest
from tiny_models import llama_config
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.errors import RecipeError

RECIPES = Path(__file__).parents[2] / "launchers/recipes"


def plan(*arguments: str) -> str:
    return " ".join(CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False).output.split())


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps(llama_config().to_dict()))
    return [
        str(RECIPES / "quickstart/sft.yaml"),
        f"models.policy={tmp_path}",
        "data.max_length=64",
        "--gpus",
        "1",
    ]


def test_layouts_that_fit_are_simulated_and_come_with_their_commands(tiny: list[str]) -> None:
    said = plan(*tiny, "--gpu", "h100")
    # On one GPU there are two: with recomputation and without, which is faster.
    assert "on the fullest GPU (simulated)" in said and said.index("1. ") < said.index("2. ")
    assert "the update takes 3.00 forwards" in said and "the update takes 4.00 forwards" in said
    first, second = ("precision.recompute=false --ranks 1", "precision.recompute=true --ranks 1")
    assert said.index(first) < said.index(second)


def test_seconds_follow_from_the_operations_of_a_step() -> None:
    """RTO of the paper on 8 H100: 1,024 responses to prompts of 1,024 tokens, as long.

    Forwards of 8B are three (policy, reference, DPO model), and two are of 1B (critic, reward model).
    """
    arguments = ["--gpus", "8", "--gpu", "h100", "--no-simulated"]
    kept = ["rollout.ahead=0", "rollout.colocated=false", "parallel.pipeline=1"]
    planned = CliRunner().invoke(app, ["plan", str(RECIPES / "llama3_8b/rto.yaml"), *kept, *arguments]).output
    said = " ".join(planned.split())
    tokens = 1024 * 2048
    # N s + attention: 2 x 7.505e9 x s + 2 x 32 x 4096 x s^2, and of the 1B model without its head, both per sequence.
    of_8b = 2 * 7.505e9 * tokens + 2 * 32 * 4096 * 2048 * tokens
    of_1b = 2 * 0.973e9 * tokens + 2 * 16 * 2048 * 2048 * tokens
    seconds = (3 * of_8b + 2 * of_1b) / (4 * 989e12 * 0.40)
    assert f"score │ {seconds:.1f}" in said
    assert "--ranks 4 --pool-gpus 4" in said
    assert_known(planned, "launch")


def test_ways_to_sample_are_tried_and_what_is_given_is_kept() -> None:
    arguments = ["--gpus", "8", "--gpu", "h100", "--no-simulated"]
    kept = ["parallel.tensor=4", "parallel.pipeline=1", "precision.recompute=true"]
    planned = CliRunner().invoke(app, ["plan", str(RECIPES / "llama3_8b/rto.yaml"), *kept, *arguments]).output
    assert_known(planned, "launch")
    commands = [line for line in planned.splitlines() if line.startswith("rto launch ")]
    together, ahead, apart = commands  # of the same work the more GPUs, and the more at a time, the faster
    assert "rollout.colocated=true" in together and "--ranks 8" in together
    assert "rollout.ahead=1 algorithm.pool_importance_cap=2" in ahead and "rollout.ahead" not in apart
    assert all(one.count("parallel.tensor=") == one.count("precision.recompute=") == 1 for one in commands)
    # With rollouts ahead a step takes as long as sampling, or as all the rest, and 1.33 times that.
    of_ahead = planned.split("2. ")[1].split("3. ")[0]
    seconds = {name: float(found) for name, found in re.findall(r"│ (\w+) +│ +([\d.]+) │", of_ahead)}
    rest = seconds["push"] + seconds["score"] + seconds["update"]
    assert float(of_ahead.split(" s a step")[0]) == pytest.approx(
        1.33 * max(seconds["sample"], rest), abs=0.3
    )
    assert "layouts of roles: with parallel.roles.critic.tensor=1 parallel.roles.reward.tensor=1" in planned
    assert "rollouts ahead: without rollout.ahead=1" in planned and "offload: with offload=[" in planned


def assert_known(planned: str, command: str) -> None:
    """Options are read before the help is printed, and nothing is started."""
    commands = [line for line in planned.splitlines() if line.startswith(f"rto {command} ")]
    assert len(commands) == 3
    for one in commands:
        ended = CliRunner().invoke(app, [*shlex.split(one)[1:], "--help"])
        assert ended.exit_code == 0, ended.output


@pytest.mark.slow
def test_batch_jobs_that_it_plans_are_known() -> None:
    arguments = ["--gpus", "32", "--gpu", "h100", "--no-simulated"]
    planned = CliRunner().invoke(app, ["plan", str(RECIPES / "llama3_8b/rto.yaml"), *arguments])
    assert_known(planned.output, "slurm")


def test_a_budget_in_which_nothing_fits_is_refused_with_ways_out() -> None:
    with pytest.raises(RecipeError) as refused:
        plan(str(RECIPES / "llama3_8b/dpo.yaml"), "--gpus", "1", "--gpu", "a100")
    said = str(refused.value)
    assert "no layout fits 1 a100 of 79.0 GiB" in said and "too much" in said
    # The policy of 8.03 B parameters takes 18 bytes each, 134.6 GiB, and activations 7.4 while the reference waits in
    # host memory: two GPUs have 158, an H200 139.4.
    assert said.endswith("Ways out: take 2 GPUs; take 1 b200")


def test_stages_without_a_step_and_unknown_models_are_told_as_what_they_are() -> None:
    with pytest.raises(RecipeError, match="stage evaluate trains nothing"):
        plan(str(RECIPES / "quickstart/evaluate.yaml"), "--gpus", "2")
    with pytest.raises(RecipeError, match=r"shapes of policy, reference are not known; .* --assume policy="):
        plan(str(RECIPES / "llama3_8b/dpo.yaml"), "models.policy=no/name", "models.reference=no/name")


@pytest.mark.parametrize(
    ("recipe", "given", "said"),
    [
        (
            "rto",
            ["--response-tokens", "1025"],
            "--response-tokens 1025: expected at most 1024, sampling.max_resp",
        ),
        (
            "rto",
            ["--prompt-tokens", "1025"],
            "--prompt-tokens 1025: expected at most 1024, data.max_prompt_tokens",
        ),
        (
            "dpo",
            ["--prompt-tokens", "2000", "--response-tokens", "100"],
            "expected at most 2048, data.max_length",
        ),
    ],
)
def test_longer_texts_than_the_recipe_admits_are_refused(recipe: str, given: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        plan(str(RECIPES / f"llama3_8b/{recipe}.yaml"), *given)
