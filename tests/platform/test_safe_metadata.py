"""A torch_dist checkpoint is read without running what it holds; an honest one loads (test_torch_adam.py)."""

import io
import pickle

import pytest
import torch
from tiny_gpt import Touch, poison_metadata
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader

from rto_megatron.errors import ModelFolderError
from rto_megatron.platform.safe_metadata import read_metadata, safe_reading


def test_poisoned_metadata_is_refused_by_name_and_not_run(tmp_path):
    poison_metadata(tmp_path, Touch(tmp_path / "touched"))
    with pytest.raises(ModelFolderError, match=r"posix\.mknod"), safe_reading(tmp_path):
        pytest.fail("entered the context")
    with pytest.raises(ModelFolderError, match=r"posix\.mknod"):
        FileSystemReader(tmp_path).read_metadata()
    assert not (tmp_path / "touched").exists()


def test_poisoned_object_is_refused_by_name_and_not_run(tmp_path):
    checkpoint.save({"state": Touch(tmp_path / "touched")}, checkpoint_id=tmp_path, no_dist=True)
    with (
        pytest.raises(ModelFolderError, match=r"object state cannot be read \(it names posix\.mknod"),
        safe_reading(tmp_path),
    ):
        checkpoint.load({"state": b""}, checkpoint_id=tmp_path, no_dist=True)
    assert not (tmp_path / "touched").exists()


def test_tensors_and_plain_objects_load(tmp_path):
    saved = {"weight": torch.arange(6.0).view(2, 3).bfloat16(), "note": {"steps": [1, 2], "name": "tiny"}}
    checkpoint.save(saved, checkpoint_id=tmp_path, no_dist=True)
    loaded = {"weight": torch.zeros(2, 3, dtype=torch.bfloat16), "note": {"steps": [0, 0], "name": ""}}
    with safe_reading(tmp_path):
        checkpoint.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(loaded["weight"], saved["weight"])
    assert loaded["note"] == saved["note"]


def test_missing_data_is_an_ordinary_exception(tmp_path):
    checkpoint.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    for file in tmp_path.glob("*.distcp"):
        file.unlink()
    with pytest.raises(RuntimeError, match=r"\.distcp"), safe_reading(tmp_path):
        checkpoint.load({"weight": torch.zeros(2)}, checkpoint_id=tmp_path, no_dist=True)


def test_dotted_global_names_do_not_reach_past_the_allow_list():
    # Protocol 4 looks up each part of a dotted name, so torch.Size's attributes must not open a way out.
    stream = io.BytesIO(b"\x80\x04\x8c\x05torch\x8c\x10serialization.os\x93.")
    with pytest.raises(ModelFolderError, match=r"torch\.serialization\.os"):
        read_metadata(stream)


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", pickle.dumps({"a": 1})[:-3], pickle.dumps({"a": 1})]
)
def test_damaged_metadata_is_a_user_error(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"\.metadata"), safe_reading(tmp_path):
        pytest.fail("entered the context")


def test_folder_without_metadata_is_a_user_error(tmp_path):
    with pytest.raises(ModelFolderError, match=r"holds no \.metadata"), safe_reading(tmp_path):
        pytest.fail("entered the context")
