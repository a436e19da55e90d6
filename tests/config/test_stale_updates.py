"""Updates that no ratio corrects, as `rto check` tells them."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.config.load import load_recipe
from rto_megatron.config.stale_updates import stale_updates

RECIPES = Path(__file__).parents[2] / "launchers" / "recipes"


def test_recipes_of_the_repository_make_no_stale_updates() -> None:
    warned = {path.name: stale_updates(load_recipe(path, [])) for path in RECIPES.glob("quickstart/*.yaml")}
    assert "rloo.yaml" in warned and not any(warned.values())


@pytest.mark.parametrize(("stage", "is_warned"), [("rloo", True), ("grpo", False)])
def test_check_warns_of_updates_that_no_ratio_corrects(stage: str, is_warned: bool) -> None:
    recipe = str(RECIPES / "quickstart" / f"{stage}.yaml")
    config = load_recipe(Path(recipe), [])
    responses = config.responses_per_step
    halved = f"batch.train={responses // 2}"
    printed = CliRunner().invoke(app, ["check", recipe, halved]).output
    words = (
        f"{halved} makes 2 updates of the {responses} responses of a step, of which stage rloo corrects none"
    )
    assert (words in " ".join(printed.split())) == is_warned, printed
