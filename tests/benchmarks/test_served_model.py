"""Which folder a pool serves: the one that is named, or a checkpoint's export, made once."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_llama

from rto_megatron.benchmarks.served_model import served_model
from rto_megatron.convert.conversion import Proofs, convert_to_megatron, silent
from rto_megatron.convert.conversion_options import Options
from rto_megatron.errors import ModelFolderError


def test_a_checkpoint_is_exported_once_and_told_apart_from_another(tmp_path: Path) -> None:
    source, checkpoint = tmp_path / "source", tmp_path / "checkpoint"
    write_llama(source)
    convert_to_megatron(source, checkpoint, Options(None, 10**9, False), Proofs(True, None), silent, False)
    first = served_model(checkpoint, tmp_path / "export", silent)
    written = load_file(first.folder / "model.safetensors")
    wanted = load_file(source / "model.safetensors")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in wanted.items())
    made = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert served_model(checkpoint, tmp_path / "export", silent) == first
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == made
    for path in (checkpoint / "release").iterdir():
        os.utime(path, ns=(1, 1))  # as if the checkpoint had been written anew
    second = served_model(checkpoint, tmp_path / "export", silent)
    assert second.weights != first.weights and second.folder != first.folder


def test_a_hugging_face_folder_is_served_as_it_is_and_needs_weights(tmp_path: Path) -> None:
    write_llama(tmp_path / "model")
    assert served_model(tmp_path / "model", tmp_path / "export", silent).folder == tmp_path / "model"
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="safetensors"):
        served_model(tmp_path / "model", tmp_path / "export", silent)
