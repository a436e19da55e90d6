"""`rto check` and `rto doctor` look whether the models that are here have a row for every id."""

import shutil
from pathlib import Path

import pytest
import yaml
from tiny_models import write_llama
from tiny_tokenizers import add_token, change_json
from trainer.tiny_runs import configure
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.config.schema import Stage
from rto_megatron.diagnosis.recipe import check_models
from rto_megatron.errors import RecipeError

EXTRA = "<|extra|>"


def _check(config: Stage, recipe: Path) -> str:
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    shown = CliRunner().invoke(app, ["check", str(recipe)], catch_exceptions=False)
    assert shown.exit_code == 0
    return " ".join(shown.output.split())


@pytest.fixture
def policy(tiny_files: Path, tmp_path: Path) -> Path:
    """A policy with a token behind its vocabulary."""
    shutil.copytree(tiny_files / "models/policy", tmp_path / "policy")
    add_token(tmp_path / "policy", EXTRA)
    return tmp_path / "policy"


def test_a_token_that_nothing_writes_is_a_warning(tiny_files: Path, policy: Path, tmp_path: Path) -> None:
    config = configure("sft", tiny_files, tmp_path / "run", models__policy=policy)
    words = f"models.policy: the embedding (vocab_size=96) has no row for '{EXTRA}' (id 96)"
    output = _check(config, tmp_path / "sft.yaml")
    assert f"warning: {words}" in output and "nothing speaks against" in output
    (warning,) = [finding for finding in check_models(config, 1) if finding.level == "warning"]
    assert words in warning.found and warning.why and warning.fix


def test_a_token_that_every_run_reads_is_a_problem(tiny_files: Path, policy: Path, tmp_path: Path) -> None:
    change_json(policy / "tokenizer_config.json", eos_token=EXTRA)
    config = configure("sft", tiny_files, tmp_path / "run", models__policy=policy)
    words = (
        f"models.policy: the token '{EXTRA}' (id 96), the end-of-sequence token, has no row in the embedding"
    )
    with pytest.raises(RecipeError) as caught:
        _check(config, tmp_path / "sft.yaml")
    assert words in str(caught.value)
    assert [words in finding.found for finding in check_models(config, 1)] == [True]


def test_a_model_smaller_than_the_policy_is_a_problem_where_the_policy_samples(
    tiny_files: Path, tmp_path: Path
) -> None:
    larger = tmp_path / "larger"
    write_llama(larger, vocab_size=104)
    shutil.copytree(tiny_files / "tokenizer", larger, dirs_exist_ok=True)
    changes = {"models__policy": larger, "models__reference": larger}
    config = configure("ppo", tiny_files, tmp_path / "run", **changes)
    with pytest.raises(RecipeError) as caught:
        _check(config, tmp_path / "ppo.yaml")
    for role in ("reward", "critic"):
        words = f"models.{role} has vocab_size=96 and models.policy, whose samples it reads, 104"
        assert words in str(caught.value)
        assert any(words in finding.found for finding in check_models(config, 1))
    offline = configure("dpo", tiny_files, tmp_path / "run", models__policy=larger)
    assert "nothing speaks against" in _check(offline, tmp_path / "dpo.yaml")
