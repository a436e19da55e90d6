"""Whatever happens to a save or to the disk, the newest whole checkpoint is found and an error says what happened."""

import ctypes
import json
import os
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch
from engine.layouts import topology, trained
from engine.saved_steps import ADAM, checkpoint_names, file_contents, found_by_both, save_ending, save_steps
from ranks import RankError, run_ranks

from rto_megatron.engine.checkpoint import begin_save, load_weights
from rto_megatron.engine.integrity import DiskFull
from rto_megatron.engine.recovery import find_valid
from rto_megatron.engine.source import find_source
from rto_megatron.errors import ModelFolderError
from rto_megatron.platform.sync_save import ShardWriter

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
        save_steps(topology("tp2"), model_folder, tmp_path, (2, 4))

    with pytest.raises(RankError, match=r"rank 0 died, wait status 9|closed by peer|reset by peer"):
        run_ranks(2, killed)
    assert (tmp_path / "fired").read_text() == f"{site}:4:0:kill\n"
    stood = file_contents(tmp_path / "checkpoints/step_000002")
    is_partial = site != "ckpt_pointer"
    assert (".partial_step_000004" in checkpoint_names(tmp_path)) == is_partial
    assert ("step_000004" in checkpoint_names(tmp_path)) != is_partial
    assert (tmp_path / "checkpoints/latest").read_text() == "step_000002\n"
    assert found_by_both(tmp_path) == (KILLED[site], ())
    assert run_ranks(2, save_ending, "tp2", model_folder, tmp_path, (6,)) == ["saved"] * 2
    assert checkpoint_names(tmp_path) == ["latest", *sorted(["step_000006", KILLED[site]])]
    assert (tmp_path / "checkpoints/latest").read_text() == "step_000006\n"
    if is_partial:
        assert file_contents(tmp_path / "checkpoints/step_000002") == stood


def test_a_first_save_that_is_killed_is_no_checkpoint(model_folder: Path, tmp_path: Path) -> None:
    def killed() -> None:
        os.environ["RTO_FAULT"] = "ckpt_rename:1:0:kill"
        os.environ["RTO_FAULT_LOG"] = str(tmp_path / "fired")
        save_steps(topology("one"), model_folder, tmp_path, (1,))

    with pytest.raises(RankError, match="wait status 9"):
        run_ranks(1, killed)
    assert checkpoint_names(tmp_path) == [".partial_step_000001"]
    assert found_by_both(tmp_path) == (None, ())
    with pytest.raises(ModelFolderError, match=r"models\.policy: .* no|neither"):
        find_source(tmp_path, has_scalar_head=False, is_random=False, key="models.policy")


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
        message = save_ending("one", model_folder, tmp_path / "disk", (1,))
        assert checkpoint_names(tmp_path / "disk") == []
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
        assert save_ending("one", model_folder, tmp_path / "disk", (2,)) == "saved"
        _make_read_only(tmp_path / "disk")
        message = save_ending("one", model_folder, tmp_path / "disk", (4,))
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
    return save_ending("tp2", model_folder, run_dir, (6,))


@pytest.mark.parametrize(
    "fault", [None, *(f"{site}:6:{0 if site != 'ckpt_shard' else 1}:disk" for site in KILLED)]
)
def test_a_disk_that_fills_up_stops_all_ranks_and_loses_nothing(
    fault: str | None, two_steps: Path, model_folder: Path, tmp_path: Path
) -> None:
    """A limit on the size of files fills it in the middle of a shard; the others at every later place."""
    shutil.copytree(two_steps, tmp_path / "run")
    before = file_contents(tmp_path / "run/checkpoints")
    messages = run_ranks(2, _limited, model_folder, tmp_path / "run", fault)
    print(messages[0])
    for message in messages:
        assert message.startswith("DiskFull DISK: the disk is full: ")
        assert f"{tmp_path}/run/checkpoints/.partial_step_000006" in message
        assert "bytes, and" in message and "are free in" in message
    assert messages[0] == messages[1]
    after = file_contents(tmp_path / "run/checkpoints")
    assert {name: after.get(name) for name in before} == before
    assert not any(name.startswith(".partial") for name in checkpoint_names(tmp_path / "run"))
    newest = "step_000006" if fault is not None and "pointer" in fault else "step_000004"
    assert found_by_both(tmp_path / "run") == (newest, ())


def test_a_run_folder_that_vanished_is_not_made_anew(model_folder: Path, tmp_path: Path) -> None:
    for message in run_ranks(2, save_ending, "tp2", model_folder, tmp_path / "gone", (1,)):
        assert message.startswith("CheckpointError CHECKPOINT: the checkpoint cannot be written: ")
        assert f"{tmp_path / 'gone/checkpoints'}: No such file or directory" in message
    assert not (tmp_path / "gone").exists()


def test_only_the_newest_stay_and_the_pointer_stands_before_one_goes(
    model_folder: Path, tmp_path: Path
) -> None:
    def killed() -> None:
        os.environ["RTO_FAULT"] = "ckpt_pointer:3:0:kill"
        os.environ["RTO_FAULT_LOG"] = str(tmp_path / "fired")
        save_steps(topology("one"), model_folder, tmp_path, (1, 2, 3), keep=1)

    with pytest.raises(RankError, match="wait status 9"):
        run_ranks(1, killed)
    assert checkpoint_names(tmp_path) == ["latest", "step_000002", "step_000003"]


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
    assert checkpoint_names(tmp_path) == []
