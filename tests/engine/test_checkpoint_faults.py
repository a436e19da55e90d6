"""Whatever happens to a save or to the disk, the newest whole checkpoint is found, and damage is named."""

import ctypes
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine.layouts import topology, trained
from ranks import RankError, run_ranks
from tiny_models import write_llama

from rto_megatron.config.training import OptimizerConfig
from rto_megatron.engine.checkpoint import begin_save, load_weights
from rto_megatron.engine.integrity import CheckpointError, DiskFull
from rto_megatron.engine.recovery import find_valid
from rto_megatron.engine.source import find_source
from rto_megatron.errors import ModelFolderError
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.sync_save import ShardWriter

ADAM = OptimizerConfig(lr=1e-3)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model."""
    folder = tmp_path_factory.mktemp("model")
    write_llama(folder, 7)
    return folder


def _save(place: Topology, model_folder: Path, run_dir: Path, steps: tuple[int, ...], keep: int = 2) -> None:
    model = trained(place, model_folder, False, ADAM)
    for step in steps:
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.fill_(float(step))
        begin_save(run_dir, step, {"policy": model}, {"policy": model_folder}, {"step": step}, keep).finish()


def _saved(layout: str, model_folder: Path, run_dir: Path, steps: tuple[int, ...]) -> str:
    """The kind and text of the error that ended the save."""
    try:
        _save(topology(layout), model_folder, run_dir, steps)
    except CheckpointError as error:
        return f"{type(error).__name__} {error.reason}: {error}"
    return "saved"


@pytest.fixture(scope="module")
def two_steps(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 2 and 4, of two ranks."""
    run_dir = tmp_path_factory.mktemp("run")
    assert run_ranks(2, _saved, "tp2", model_folder, run_dir, (2, 4)) == ["saved"] * 2
    return run_dir


def _found(run_dir: Path, takes_older: bool = False) -> tuple[str | None, tuple[str, ...]]:
    """The step and what was lost; or None and the error."""
    try:
        found = find_valid(run_dir, topology("dp2"), takes_older)
    except CheckpointError as error:
        return None, (str(error),)
    return (found.path.name, found.warnings) if found else (None, ())


def _both(run_dir: Path, takes_older: bool = False) -> tuple[str | None, tuple[str, ...]]:
    first, second = run_ranks(2, _found, run_dir, takes_older)
    assert first == second
    return first


def _names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


KILLED = {  # where rank 0 dies in its second save -> what a run goes on from
    "ckpt_shard": "step_000002",
    "ckpt_manifest": "step_000002",
    "ckpt_rename": "step_000002",
    "ckpt_pointer": "step_000004",
}


@pytest.mark.parametrize("site", KILLED)
def test_a_save_that_is_killed_leaves_the_newest_whole_checkpoint(
    site: str, model_folder: Path, tmp_path: Path
) -> None:
    def killed() -> None:
        os.environ["RTO_FAULT"] = f"{site}:4:0:kill"
        os.environ["RTO_FAULT_LOG"] = str(tmp_path / "fired")
        _save(topology("tp2"), model_folder, tmp_path, (2, 4))

    with pytest.raises(RankError, match=r"rank 0 died, wait status 9|closed by peer|reset by peer"):
        run_ranks(2, killed)
    assert (tmp_path / "fired").read_text() == f"{site}:4:0:kill\n"
    stood = _content(tmp_path / "checkpoints/step_000002")
    is_partial = site != "ckpt_pointer"
    assert (".partial_step_000004" in _names(tmp_path)) == is_partial
    assert ("step_000004" in _names(tmp_path)) != is_partial
    assert (tmp_path / "checkpoints/latest").read_text() == "step_000002\n"
    assert _both(tmp_path) == (KILLED[site], ())
    assert run_ranks(2, _saved, "tp2", model_folder, tmp_path, (6,)) == ["saved"] * 2
    assert _names(tmp_path) == ["latest", *sorted(["step_000006", KILLED[site]])]
    assert (tmp_path / "checkpoints/latest").read_text() == "step_000006\n"
    if is_partial:
        assert _content(tmp_path / "checkpoints/step_000002") == stood


def test_a_first_save_that_is_killed_is_no_checkpoint(model_folder: Path, tmp_path: Path) -> None:
    def killed() -> None:
        os.environ["RTO_FAULT"] = "ckpt_rename:1:0:kill"
        os.environ["RTO_FAULT_LOG"] = str(tmp_path / "fired")
        _save(topology("one"), model_folder, tmp_path, (1,))

    with pytest.raises(RankError, match="wait status 9"):
        run_ranks(1, killed)
    assert _names(tmp_path) == [".partial_step_000001"]
    assert _both(tmp_path) == (None, ())
    with pytest.raises(ModelFolderError, match=r"models\.policy: .* no|neither"):
        find_source(tmp_path, has_scalar_head=False, is_random=False, key="models.policy")


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
    before = _content(run_dir)
    nothing, (error,) = _both(run_dir)
    print(damage, "->", error)
    assert nothing is None
    assert named in error and str(run_dir) in error
    assert "is step_000002" in error and "run.resume_from_older=true" in error
    assert _content(run_dir) == before

    name, lost = _both(run_dir, takes_older=True)
    assert name == "step_000002"
    assert len(lost) == 2 and named in lost[0] and "goes on from step_000002" in lost[1]
    is_left = damage != "the folder is gone"
    assert _names(run_dir) == [*(["damaged_step_000004"] if is_left else []), "latest", "step_000002"]
    kept = _content(run_dir)
    for path, content in before.items():
        if not path.endswith("latest"):
            assert kept[path.replace("/step_000004/", "/damaged_step_000004/")] == content
    assert _both(run_dir) == ("step_000002", ())


def test_two_manifests_exchanged_between_steps_are_noticed(two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path / "run")
    _swap_manifests(tmp_path / "run/checkpoints/step_000004")
    nothing, (error,) = _both(tmp_path / "run", takes_older=True)
    assert nothing is None
    assert "step_000004/manifest.json is of step 2" in error
    assert "step_000002/manifest.json is of step 4" in error
    assert "no checkpoint in" in error


@pytest.mark.parametrize("pointer", ["", "step_4", "../../elsewhere", None])
def test_a_damaged_pointer_loses_nothing(pointer: str | None, two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path / "run")
    path = tmp_path / "run/checkpoints/latest"
    path.unlink() if pointer is None else path.write_text(pointer)
    name, lost = _both(tmp_path / "run")
    assert name == "step_000004"
    assert len(lost) == (pointer is not None)
    assert all(f"{path} is damaged" in problem for problem in lost)


def test_a_pointer_without_any_checkpoint_is_no_fresh_run(two_steps: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(two_steps / "checkpoints/latest", tmp_path / "checkpoints")
    nothing, (error,) = _both(tmp_path, takes_older=True)
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


def _mount(folder: Path, options: bytes) -> bool:
    """Puts an empty memory disk over a folder, for this process alone; False where that is not allowed."""
    folder.mkdir(exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    private_recursive = (1 << 14) | (1 << 18)
    try:
        os.unshare(os.CLONE_NEWNS)
    except PermissionError:
        return False
    return (
        libc.mount(b"none", b"/", None, private_recursive, None) == 0
        and libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, options) == 0
    )


def _make_read_only(folder: Path) -> None:
    read_only_remount = 1 | (1 << 5)
    assert ctypes.CDLL(None).mount(b"none", str(folder).encode(), None, read_only_remount, None) == 0


def test_a_disk_without_room_is_told_before_anything_is_written(model_folder: Path, tmp_path: Path) -> None:
    def full() -> str:
        if not _mount(tmp_path / "disk", b"size=4m"):
            return "not allowed"
        message = _saved("one", model_folder, tmp_path / "disk", (1,))
        assert _names(tmp_path / "disk") == []
        return message

    (message,) = run_ranks(1, full)
    if message == "not allowed":
        pytest.skip("this test mounts a small disk, which needs root")
    print(message)
    assert message.startswith(
        f"DiskFull DISK: {tmp_path}/disk/checkpoints has no room for a checkpoint: it needs "
    )
    assert "bytes, and " in message and "are free; no weight was written" in message


def test_a_read_only_disk_is_named(model_folder: Path, tmp_path: Path) -> None:
    def closed() -> str:
        if not _mount(tmp_path / "disk", b"size=64m"):
            return "not allowed"
        assert _saved("one", model_folder, tmp_path / "disk", (2,)) == "saved"
        _make_read_only(tmp_path / "disk")
        message = _saved("one", model_folder, tmp_path / "disk", (4,))
        found = find_valid(tmp_path / "disk", topology("one"), takes_older=False)
        assert found is not None and found.path.name == "step_000002"
        return message

    (message,) = run_ranks(1, closed)
    if message == "not allowed":
        pytest.skip("this test mounts a small disk, which needs root")
    print(message)
    assert message.startswith("CheckpointError CHECKPOINT: the checkpoint cannot be written: ")
    assert f"{tmp_path}/disk/checkpoints" in message and "Read-only file system" in message


def _limited(model_folder: Path, run_dir: Path, fault: str | None) -> str:
    if fault is None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
    else:
        os.environ["RTO_FAULT"] = fault
        os.environ["RTO_FAULT_LOG"] = str(run_dir / "fired")
    return _saved("tp2", model_folder, run_dir, (6,))


@pytest.mark.parametrize(
    "fault", [None, *(f"{site}:6:{0 if site != 'ckpt_shard' else 1}:disk" for site in KILLED)]
)
def test_a_disk_that_fills_up_stops_all_ranks_and_loses_nothing(
    fault: str | None, two_steps: Path, model_folder: Path, tmp_path: Path
) -> None:
    """A limit on the size of files fills it in the middle of a shard; the others at every later place."""
    shutil.copytree(two_steps, tmp_path / "run")
    before = _content(tmp_path / "run/checkpoints")
    messages = run_ranks(2, _limited, model_folder, tmp_path / "run", fault)
    print(messages[0])
    for message in messages:
        assert message.startswith("DiskFull DISK: the disk is full: ")
        assert f"{tmp_path}/run/checkpoints/.partial_step_000006" in message
        assert "bytes, and" in message and "are free in" in message
    assert messages[0] == messages[1]
    after = _content(tmp_path / "run/checkpoints")
    assert {name: after.get(name) for name in before} == before
    assert not any(name.startswith(".partial") for name in _names(tmp_path / "run"))
    newest = "step_000006" if fault is not None and "pointer" in fault else "step_000004"
    assert _both(tmp_path / "run") == (newest, ())


def test_a_run_folder_that_vanished_is_not_made_anew(model_folder: Path, tmp_path: Path) -> None:
    for message in run_ranks(2, _saved, "tp2", model_folder, tmp_path / "gone", (1,)):
        assert message.startswith("CheckpointError CHECKPOINT: the checkpoint cannot be written: ")
        assert f"{tmp_path / 'gone/checkpoints'}: No such file or directory" in message
    assert not (tmp_path / "gone").exists()


def test_only_the_newest_stay_and_the_pointer_stands_before_one_goes(
    model_folder: Path, tmp_path: Path
) -> None:
    def killed() -> None:
        os.environ["RTO_FAULT"] = "ckpt_pointer:3:0:kill"
        os.environ["RTO_FAULT_LOG"] = str(tmp_path / "fired")
        _save(topology("one"), model_folder, tmp_path, (1, 2, 3), keep=1)

    with pytest.raises(RankError, match="wait status 9"):
        run_ranks(1, killed)
    assert _names(tmp_path) == ["latest", "step_000002", "step_000003"]


def test_a_save_beside_the_training_holds_the_numbers_of_its_own_step(
    model_folder: Path, tmp_path: Path
) -> None:
    def saved() -> list[float]:
        place, filled, write = topology("dp2"), threading.Event(), ShardWriter.write

        def write_late(writer: ShardWriter) -> None:
            assert filled.wait(60)
            write(writer)

        ShardWriter.write = write_late
        model = trained(place, model_folder, False, ADAM)
        parameters = list(model.module.parameters())

        def fill(value: float) -> None:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.fill_(value)

        fill(1.0)
        saving = begin_save(
            tmp_path, 1, {"policy": model}, {"policy": model_folder}, json.loads('{"step": 1}'), keep=1
        )
        before = threading.active_count()
        saving.start()
        assert threading.active_count() == before + 1
        fill(2.0)
        filled.set()
        assert find_valid(tmp_path, place, takes_older=False) is None
        saving.finish()
        fill(3.0)
        load_weights(tmp_path / "checkpoints/step_000001/policy", model)
        return [float(value) for parameter in parameters for value in (parameter.min(), parameter.max())]

    for values in run_ranks(2, saved):
        assert set(values) == {1.0}


def test_a_failure_beside_the_training_is_an_error_of_the_run(model_folder: Path, tmp_path: Path) -> None:
    def failed() -> str:
        os.environ["RTO_FAULT"] = "ckpt_shard:1:1:disk"
        os.environ["RTO_FAULT_LOG"] = str(tmp_path / "fired")
        model = trained(topology("dp2"), model_folder, False, ADAM)
        saving = begin_save(tmp_path, 1, {"policy": model}, {"policy": model_folder}, {"step": 1}, keep=1)
        saving.start()
        with pytest.raises(DiskFull) as caught:
            saving.finish()
        return str(caught.value)

    first, second = run_ranks(2, failed)
    assert first == second and "ckpt_shard:1:1:disk" in first
    assert _names(tmp_path) == []
