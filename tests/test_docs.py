"""The pages name what there is: every room of the house, and files that exist."""

import re
import shlex
from pathlib import Path

import pytest
from test_house import LAYERS, PACKAGE, ROOT

from rto_megatron.config.load import load_recipe

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def test_architecture_names_every_room() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    assert [room for room in LAYERS if room.rsplit("/", 1)[-1] not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    # Files of the package are named from the package, recipes from their folder.
    named = set(re.findall(r"`((?!megatron/)[a-z0-9_/]+/[a-z0-9_]+\.(?:py|sh|md|yaml))`", text))
    bases = (ROOT, PACKAGE, ROOT / "launchers", ROOT / "launchers/recipes", PACKAGE / "generation/vllm")
    assert [name for name in sorted(named) if not any((base / name).exists() for base in bases)] == []


def test_make_has_the_five_commands_and_their_scripts() -> None:
    text = (ROOT / "Makefile").read_text()
    assert re.findall(r"^(\w+):", text, re.MULTILINE) == ["setup", "fast", "test", "format", "quickstart"]
    called = re.findall(r"bash (\S+)|(tests/\S+)", text)
    assert [one for pair in called for one in pair if one and not (ROOT / one).exists()] == []


def test_the_papers_table_is_made_of_models_that_were_fetched_or_made_before() -> None:
    """In the order of the commands of docs/benchmarks.md, each under the name that the next one has for it."""
    page = (ROOT / "docs/benchmarks.md").read_text()
    fetch, train = re.findall(r"^    for (?:model|stage) in (.*); do$", page, re.MULTILINE)[:2]
    assert "hf download $model --local-dir $model" in page
    there = set(fetch.split())
    launches = re.findall(r"local\.sh launchers/recipes/llama3_8b/(\S+)\.yaml(.*)", page)
    assert [name for name, _ in launches] == ["$stage", "rto"]
    for loop, overrides in launches:
        for stage in train.split() if loop == "$stage" else [loop]:
            recipe = ROOT / f"launchers/recipes/llama3_8b/{stage}.yaml"
            config = load_recipe(recipe, shlex.split(overrides, comments=True))
            read = {str(one) for one in config.models.model_dump().values() if isinstance(one, Path)}
            assert read <= there, stage
            there.add(f"runs/llama3_8b/{stage}")
    (answering,) = re.findall(r"^    for name in (.*); do$", page, re.MULTILINE)
    assert answering.split() == ["sft", "dpo", "rdpo", "simpo", "tdpo", "ppo", "rto"]
    assert re.findall(r"model=([^\s;]+)", page) == ["runs/llama3_8b/$name", "OpenRLHF/Llama-3-8b-sft-mixture"]
