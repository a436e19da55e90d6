"""A checkpoint that somebody else could have written is refused; a disk that is away for a moment is waited for."""

import errno
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine.layouts import topology, trained
from engine.saved_steps import file_contents
from ranks import run_ranks

from rto_megatron.config.training import OptimizerConfig
from rto_megatron.engine.checkpoint import begin_save, load_weights
from rto_megatron.engine.integrity import CheckpointError
from rto_megatron.engine.recovery import find_valid
from rto_megatron.platform import patience
from rto_megatron.platform.patience import patiently
from rto_megatron.storage.file_digests import checkpoint_problem

STEP = "checkpoints/step_000001"
STRANGER = 54321


def _save(model_folder: Path, run_dir: Path, step: int = 1, faults: str = "") -> str:
    os.umask(0)
    os.environ.update(RTO_FAULT=faults, RTO_FAULT_LOG=str(run_dir / "fired"))
    model = trained(topology("one"), model_folder, False, OptimizerConfig(lr=1e-3))
    try:
        begin_save(run_dir, step, {"policy": model}, {"policy": model_folder}, {"step": step}, 2).finish()
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.fixture
def run_dir(model_folder: Path) -> Iterator[Path]:
    """A run with one checkpoint, where every user can enter."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    assert run_ranks(1, _save, model_folder, folder) == ["saved"]
    yield folder
    shutil.rmtree(folder)


def test_nobody_else_can_change_a_checkpoint_whatever_the_umask(run_dir: Path) -> None:
    assert [path for path in (run_dir / STEP).rglob("*") if path.stat().st_mode & 0o002] == []
    assert checkpoint_problem(run_dir / STEP) is None


@pytest.mark.parametrize("name", ["", "policy/weights", "policy/weights/.metadata", "policy/hf/config.json"])
def test_what_every_user_can_write_is_refused(name: str, run_dir: Path, model_folder: Path) -> None:
    (run_dir / STEP / name).chmod(0o777)

    def refused() -> tuple[str, str]:
        place = topology("one")
        with pytest.raises(CheckpointError) as resumed:
            find_valid(run_dir, place, takes_older=False)
        model = trained(place, model_folder, False, OptimizerConfig(lr=1e-3))
        with pytest.raises(CheckpointError) as loaded:
            load_weights(run_dir / STEP / "policy", model)
        return str(resumed.value), str(loaded.value)

    for text in run_ranks(1, refused)[0]:
        assert f"{run_dir / STEP / name} can be written by every user of this machine (mode 777)" in text
        assert f"chmod -R o-w {run_dir / STEP}" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="this test gives files to another user, which needs root")
def test_what_another_user_wrote_is_refused(run_dir: Path) -> None:
    shard = run_dir / STEP / "policy/weights/.metadata"
    os.chown(shard, STRANGER, STRANGER)
    text = checkpoint_problem(run_dir / STEP)
    assert text is not None
    assert f"{shard} belongs to user {STRANGER}, and this is user 0" in text
    assert f"cp -r {run_dir / STEP}" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="this test is another user for a moment, which needs root")
def test_a_user_reads_what_is_roots_and_nothing_of_a_third(run_dir: Path) -> None:
    for path in run_dir.rglob("*"):
        path.chmod(0o755)

    def seen() -> str | None:
        os.setresuid(STRANGER, STRANGER, STRANGER)
        return checkpoint_problem(run_dir / STEP)

    assert run_ranks(1, seen) == [None]
    os.chown(run_dir / STEP, STRANGER + 1, STRANGER)
    (text,) = run_ranks(1, seen)
    assert text is not None and f"belongs to user {STRANGER + 1}, and this is user {STRANGER}" in text


@pytest.mark.parametrize("times", [1, 3])
def test_a_stale_handle_in_a_save_is_waited_for(
    times: int, run_dir: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_PAUSES_S", (0.01, 0.02, 0.03))
    fault = "ckpt_shard:2:0:stale"

    def saved() -> tuple[str, list[str]]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result = _save(model_folder, run_dir, 2, ",".join([fault] * times))
        return result, [str(one.message) for one in said if "the disk failed" in str(one.message)]

    ((result, said),) = run_ranks(1, saved)
    assert result == "saved"
    assert len(said) == times and "trying again in 0 s: injected fault" in said[0]
    assert (run_dir / "fired").read_text().splitlines() == [fault] * times
    assert checkpoint_problem(run_dir / "checkpoints/step_000002") is None
    one, other = (
        file_contents(run_dir / STEP / "policy"),
        file_contents(run_dir / "checkpoints/step_000002/policy"),
    )
    assert one.keys() == other.keys()
    shards = [name for name in one if name.endswith(".distcp")]
    assert shards and [name for name in shards if one[name] != other[name]] == []


def test_a_save_beside_the_training_keeps_its_numbers_when_it_is_tried_again(
    run_dir: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_PAUSES_S", (1.0,))

    def saved() -> set[float]:
        os.environ.update(RTO_FAULT="ckpt_shard:2:0:stale", RTO_FAULT_LOG=str(run_dir / "fired"))
        place = topology("one")
        model = trained(place, model_folder, False, OptimizerConfig(lr=1e-3))

        def fill(value: float) -> None:
            for parameter in model.module.parameters():
                parameter.data.fill_(value)

        fill(1.0)
        saving = begin_save(run_dir, 2, {"policy": model}, {"policy": model_folder}, {"step": 2}, 2)
        saving.start()
        fill(2.0)  # long before the second try
        saving.finish()
        load_weights(run_dir / "checkpoints/step_000002/policy", model)
        return {float(one) for parameter in model.module.parameters() for one in parameter.unique()}

    assert run_ranks(1, saved) == [{1.0}]
    assert (run_dir / "fired").read_text() == "ckpt_shard:2:0:stale\n"


def test_a_handle_that_stays_stale_is_an_error_and_loses_nothing(
    run_dir: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_PAUSES_S", (0.01, 0.02, 0.03))
    before = file_contents(run_dir / "checkpoints")
    (text,) = run_ranks(1, _save, model_folder, run_dir, 2, ",".join(["ckpt_shard:2:0:stale"] * 4))
    assert "the checkpoint cannot be written" in text and "ckpt_shard:2:0:stale" in text
    assert "older checkpoints are as they were" in text
    assert file_contents(run_dir / "checkpoints") == before


def test_only_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_PAUSES_S", (0.01, 0.02))
    calls: list[int] = []

    def fail(code: int) -> None:
        calls.append(code)
        raise OSError(code, os.strerror(code), "/x")

    for code, count in (
        (errno.EIO, 3),
        (errno.ESTALE, 3),
        (errno.EROFS, 1),
        (errno.ENOSPC, 1),
        (errno.ENOENT, 1),
    ):
        calls.clear()
        with pytest.raises(OSError, match=os.strerror(code)), warnings.catch_warnings(action="ignore"):
            patiently(lambda code=code: fail(code))
        assert len(calls) == count, os.strerror(code)
