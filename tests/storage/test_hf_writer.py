"""A folder that the writer calls finished holds every tensor that was announced, as it was announced."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rto_megatron.storage.hf_writer import HfWriter

SPECS = {"one": (torch.float32, (2, 3)), "two": (torch.bfloat16, (4,))}


def writer(folder: Path) -> HfWriter:
    return HfWriter(folder, SPECS, max_shard_bytes=1 << 20)


def test_tensors_arrive_in_any_order(tmp_path: Path) -> None:
    tensors = {name: torch.ones(shape, dtype=dtype) for name, (dtype, shape) in SPECS.items()}
    to_write = writer(tmp_path)
    for name in reversed(tensors):
        to_write.write(name, tensors[name])
    to_write.finish()
    (file,) = tmp_path.glob("*.safetensors")
    read = load_file(file)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_that_never_came_is_an_error(tmp_path: Path) -> None:
    to_write = writer(tmp_path)
    to_write.write("one", torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"tensors are missing, .*: 1"):
        to_write.finish()


def test_a_tensor_of_another_shape_or_dtype_is_an_error(tmp_path: Path) -> None:
    for wrong in (torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"expected torch.float32 \(2, 3\)"):
            writer(tmp_path).write("one", wrong)
