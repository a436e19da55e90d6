"""Which checkpoint and which model of it is taken: one rule for training, converting and the estimate of memory."""

from pathlib import Path

import pytest
from tiny_models import write_llama

from rto_megatron.engine.source import find_source
from rto_megatron.planning.shapes import find_shape, hugging_face_folder
from rto_megatron.storage.checkpoints import (
    LANGUAGE_ROLES,
    SCALAR_ROLES,
    checkpoint_of,
    find_role,
    latest_checkpoint,
    pointer_problem,
)

NEWEST = "step_1000000"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with two checkpoints, whose names do not sort as their steps do, and one that was being written."""
    for step, roles in (("step_999999", ("policy", "critic")), (NEWEST, ("policy", "policy_ema"))):
        for role in roles:
            folder = tmp_path / "run" / "checkpoints" / step / role
            (folder / "weights").mkdir(parents=True)
            write_llama(folder / "hf")
    (tmp_path / "run" / "checkpoints" / "step_1000001.partial" / "policy_ema" / "weights").mkdir(parents=True)
    return tmp_path / "run"


def test_the_last_finished_step_is_the_newest_checkpoint(run_dir: Path) -> None:
    assert latest_checkpoint(run_dir) == checkpoint_of(run_dir) == run_dir / "checkpoints" / NEWEST
    older = run_dir / "checkpoints" / "step_999999"
    assert checkpoint_of(older) == older
    (run_dir / "checkpoints" / "latest").write_text("step_1000001\n")
    assert pointer_problem(run_dir) is not None


def test_training_and_the_estimate_of_memory_look_at_the_same_model(run_dir: Path) -> None:
    newest = run_dir / "checkpoints" / NEWEST
    found = find_source(run_dir, has_scalar_head=False, is_random=False, key="models.policy")
    assert (found.path, found.hf_folder) == (newest / "policy_ema", newest / "policy_ema" / "hf")
    assert hugging_face_folder(run_dir) == found.hf_folder
    shape = find_shape(run_dir, None)
    assert shape is not None and shape.folder == found.hf_folder


def test_an_older_checkpoint_is_not_searched_for_what_the_newest_lacks(run_dir: Path) -> None:
    assert find_role(run_dir, SCALAR_ROLES) is None
    assert find_shape(run_dir, None, "critic") is None
    older = run_dir / "checkpoints" / "step_999999"
    assert find_role(older, SCALAR_ROLES) == older / "critic"
    assert find_role(older, LANGUAGE_ROLES) == older / "policy"


def test_a_run_without_a_finished_checkpoint_has_no_model(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_000001.partial" / "policy" / "weights").mkdir(parents=True)
    assert checkpoint_of(tmp_path) is None and find_role(tmp_path, LANGUAGE_ROLES) is None
