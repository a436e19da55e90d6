"""Damage to a checkpoint is named, nothing is lost, and the newest whole one is found."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from engine.saved_steps import checkpoint_names, file_contents, found_by_both

from rto_megatron.engine.source import find_source
from rto_megatron.errors import ModelFolderError


def _shards(checkpoint: Path) -> list[Path]:
    return sorted((checkpoint / "policy/weights").glob("*.distcp"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _swap_manifests(checkpoint: Path) -> None:
    _swap(checkpoint / "manifest.json", checkpoint.with_name("step_000002") / "manifest.json")


# what happens to step 4 -> the file that must be named
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "one byte less": (lambda step: _cut(_shards(step)[1]), "__1_0.distcp has"),
    "a flipped bit": (lambda step: _flip(_shards(step)[0]), "__0_0.distcp is not the file that was saved"),
    "a missing shard": (lambda step: _shards(step)[1].unlink(), "__1_0.distcp is missing"),
    "a shard of another step": (
        lambda step: shutil.copy(_shards(step.with_name("step_000002"))[0], _shards(step)[0]),
        "__0_0.distcp is not the file that was saved",
    ),
    "another state": (lambda step: _edit(step / "state.json", "4", "3"), "state.json is not the file"),
    "no state": (lambda step: (step / "state.json").unlink(), "state.json is missing"),
    "a tokenizer or config": (lambda step: _flip(step / "policy/hf/config.json"), "hf/config.json is not"),
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "manifest.json is missing or damaged"),
    "an empty manifest": (
        lambda step: (step / "manifest.json").write_text(""),
        "manifest.json is missing or",
    ),
    "a manifest of nothing": (
        lambda step: (step / "manifest.json").write_text('{"step": 4, "files": {}}'),
        "manifest.json names no file",
    ),
    "a manifest that leads outside": (
        lambda step: _edit(step / "manifest.json", '"state.json"', '"../state.json"'),
        "it names ../state.json",
    ),
    "the folder is gone": (shutil.rmtree, "latest names step_000004, which is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_the_newest_checkpoint_is_named_and_nothing_is_lost(
    damage: str, two_steps: Path, tmp_path: Path
) -> None:
    shutil.copytree(two_steps, tmp_path / "run")
    run_dir, step = tmp_path / "run", tmp_path / "run/checkpoints/step_000004"
    do, named = DAMAGE[damage]
    do(step)
    before = file_contents(run_dir)
    nothing, (error,) = found_by_both(run_dir)
    print(damage, "->", error)
    assert nothing is None
    assert named in error and str(run_dir) in error
    assert "is step_000002" in error and "run.resume_from_older=true" in error
    assert file_contents(run_dir) == before

    name, lost = found_by_both(run_dir, takes_older=True)
    assert name == "step_000002"
    assert len(lost) == 2 and named in lost[0] and "goes on from step_000002" in lost[1]
    is_left = damage != "the folder is gone"
    assert checkpoint_names(run_dir) == [
        *(["damaged_step_000004"] if is_left else []),
        "latest",
        "step_000002",
    ]
    kept = file_contents(run_dir)
    for path, content in before.items():
        if not path.endswith("latest"):
            assert kept[path.replace("/step_000004/", "/damaged_step_000004/")] == content
    assert found_by_both(run_dir) == ("step_000002", ())


def test_two_manifests_exchanged_between_steps_are_noticed(two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path / "run")
    _swap_manifests(tmp_path / "run/checkpoints/step_000004")
    nothing, (error,) = found_by_both(tmp_path / "run", takes_older=True)
    assert nothing is None
    assert "step_000004/manifest.json is of step 2" in error
    assert "step_000002/manifest.json is of step 4" in error
    assert "no checkpoint in" in error


@pytest.mark.parametrize("pointer", ["", "step_4", "../../elsewhere", None])
def test_a_damaged_pointer_loses_nothing(pointer: str | None, two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path / "run")
    path = tmp_path / "run/checkpoints/latest"
    path.unlink() if pointer is None else path.write_text(pointer)
    name, lost = found_by_both(tmp_path / "run")
    assert name == "step_000004"
    assert len(lost) == (pointer is not None)
    assert all(f"{path} is damaged" in problem for problem in lost)


def test_a_pointer_without_any_checkpoint_is_no_fresh_run(two_steps: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(two_steps / "checkpoints/latest", tmp_path / "checkpoints")
    nothing, (error,) = found_by_both(tmp_path, takes_older=True)
    assert nothing is None
    assert "latest holds 'step_000004', and no checkpoint is beside it" in error
    with pytest.raises(ModelFolderError, match=r"models\.policy: .*latest holds 'step_000004', and no"):
        find_source(tmp_path, has_scalar_head=False, is_random=False, key="models.policy")


def test_weights_are_not_drawn_over_those_of_a_checkpoint(two_steps: Path) -> None:
    for path in (two_steps, two_steps / "checkpoints/step_000004"):
        assert find_source(path, False, is_random=False, key="models.policy").kind == "checkpoint"
        with pytest.raises(
            ModelFolderError, match=r"models\.policy: .* would not be read with models\.random_init"
        ):
            find_source(path, False, is_random=True, key="models.policy")
    alone = two_steps / "checkpoints/step_000004/policy/hf"
    assert find_source(alone, False, is_random=True, key="models.policy").kind == "random"
