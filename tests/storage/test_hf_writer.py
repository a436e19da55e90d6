"""A folder that the writer calls finished holds every tensor that was announced, as it was announced."""

import json
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


def test_shards_are_as_full_as_they_may_be_aligned_and_indexed(tmp_path: Path) -> None:
    """Headers are read by the format's definition: their length, then JSON, up to a multiple of 8."""
    specs = {"a": (torch.bfloat16, (3,)), "b": (torch.float32, (2,)), "c": (torch.float32, (4,))}
    to_write = HfWriter(tmp_path, specs, max_shard_bytes=16)
    for name, (dtype, shape) in specs.items():
        to_write.write(name, torch.ones(shape, dtype=dtype))
    to_write.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index["weight_map"] == {"a": files[0], "b": files[0], "c": files[1]}
    assert index["metadata"]["total_size"] == 6 + 8 + 16
    for file in files:
        content = (tmp_path / file).read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert (8 + length) % 8 == 0
        header = json.loads(content[8 : 8 + length])
        for name in header.keys() - {"__metadata__"}:
            assert header[name]["data_offsets"][0] % specs[name][0].itemsize == 0
