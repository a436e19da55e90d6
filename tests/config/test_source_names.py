"""Sources in a recipe: a name, a list, a mixture; what is none is refused with its key."""

from pathlib import Path

import pytest

from rto_megatron.config.load import dump, load_recipe
from rto_megatron.config.schema import OfflineStage
from rto_megatron.config.source_names import MixturePart, parts_of
from rto_megatron.errors import RecipeError

RECIPE = "stage: sft\nrun: {dir: r}\nmodels: {policy: p}\noptimizer: {lr: 1.0e-6}\ndata: {train: %s}\n"


def load(folder: Path, train: str, *overrides: str) -> OfflineStage:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE % train)
    config = load_recipe(path, overrides)
    assert isinstance(config, OfflineStage)
    return config


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "set").mkdir()


def test_local_names_are_made_absolute_and_names_of_the_hub_are_not(tmp_path: Path) -> None:
    given = "[a.jsonl, {source: set, weight: 2}, 'b/*.jsonl', 'owner/name:train[:10%]', gone.jsonl]"
    parts = parts_of(load(tmp_path, given).data.train)
    assert [(part.source, part.weight) for part in parts] == [
        (str(tmp_path / "a.jsonl"), 1.0),
        (str(tmp_path / "set"), 2.0),
        (str(tmp_path / "b/*.jsonl"), 1.0),
        ("owner/name:train[:10%]", 1.0),
        ("gone.jsonl", 1.0),
    ]


def test_a_mixture_can_be_given_on_the_command_line_and_comes_back_from_a_dump(tmp_path: Path) -> None:
    config = load(tmp_path, "a.jsonl", "data.train=[a.jsonl,{source: set, weight: 0.5}]", "data.eval=a.jsonl")
    one, other = parts_of(config.data.train)
    assert (one.source, other) == (
        str(tmp_path / "a.jsonl"),
        MixturePart(source=str(tmp_path / "set"), weight=0.5),
    )
    path = tmp_path / "dumped.yaml"
    path.write_text(dump(config))
    assert load_recipe(path) == config


def test_a_name_stays_text(tmp_path: Path) -> None:
    (tmp_path / "[x].jsonl").touch()
    assert load(tmp_path, "a.jsonl").data.train == str(tmp_path / "a.jsonl")
    assert load(tmp_path, "a.jsonl", "data.train=[x].jsonl").data.train == str(tmp_path / "[x].jsonl")


REFUSED = {
    "data.train: .*expected a path, a name of the hub, or a list": "5",
    "data.train: .*the list names no source": "[]",
    "data.train: .*entry 1 is 3, expected a path, or": "[a.jsonl, 3]",
    "data.train: .*entry 0 has the keys wieght": "[{source: a.jsonl, wieght: 2}]",
    "data.train: .*entry 0 has the weight 0, expected a number above 0": "[{source: a.jsonl, weight: 0}]",
    "data.train: .*a.jsonl: named twice": "[a.jsonl, {source: a.jsonl, weight: 2}]",
    "data.eval: .*held-out rows are read once each": "a.jsonl, eval: [{source: a.jsonl, weight: 2}]",
    "data.layout: .*must be": "a.jsonl, layout: alpacca",
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_source_is_refused_by_its_key(message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, REFUSED[message])
