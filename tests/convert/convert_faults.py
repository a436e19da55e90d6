"""Ways to damage a checkpoint, each planting faults in a folder, and what must be said of them."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from commands import convert
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from rto_megatron.errors import ModelFolderError
from rto_megatron.storage import torch_dist_writer
from rto_megatron.storage.torch_dist_reader import TorchDistReader
from rto_megatron.storage.weight_files import INDEX, SINGLE

Tensors = dict[str, Tensor]


def require_refused(command: str, source: Path, message: str) -> None:
    """The command ends with the message, and its target does not appear."""
    target = source.parent / "target"
    with pytest.raises(ModelFolderError, match=message):
        convert(command, source, target)
    assert not target.exists()


def edit_hf(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Writes model.safetensors again with other tensors."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / SINGLE, {"format": "pt"})


def split_hf(folder: Path, moved: str) -> Path:
    """Moves one tensor into a second file, and returns the path of the index."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    save_file({moved: tensors.pop(moved)}, folder / "b.safetensors", {"format": "pt"})
    save_file(tensors, folder / "a.safetensors", {"format": "pt"})
    write_index(folder, {**dict.fromkeys(tensors, "a.safetensors"), moved: "b.safetensors"})
    return folder / INDEX


def write_index(folder: Path, files: Mapping[str, str]) -> None:
    """Tensor name -> file name."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(files)}))


def edit_index(folder: Path, name: str, file: str | None) -> None:
    """Has the index say that a tensor is in another file; null: does not list it."""
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    files.pop(name, None)
    write_index(folder, files if file is None else {**files, name: file})


def write_safetensors(path: Path, header: object, data: bytes, length: int | None = None) -> None:
    """A safetensors file by hand.

    Args:
        header: JSON.
        length: of the header, as the file announces it; null: the true one.
    """
    text = json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def rewrite(weights: Path, change: Callable[[Tensors], None]) -> None:
    """Writes a torch_dist folder again with other tensors, entry by entry."""
    reader = TorchDistReader(weights)
    tensors = {
        key: reader.read(key, tuple(0 for _ in reader.shape(key)), reader.shape(key)).clone()
        for key in reader.entries
    }
    objects = read_metadata(weights).state_dict_metadata.keys() - reader.entries.keys()
    common = torch.load(weights / "common.pt", weights_only=True)
    change(tensors)
    for path in weights.iterdir():
        path.unlink()
    with torch_dist_writer.opened(weights, 10**9) as writer:
        for key, tensor in tensors.items():
            writer.tensor(key, tuple(tensor.shape), tuple(0 for _ in tensor.shape), tensor.contiguous())
        for key in sorted(objects - {"common_state/shard_0_1"}):
            writer.bytes_object(key, [None])
        writer.finish(common)


def read_metadata(weights: Path) -> Metadata:
    """`.metadata` of a folder that this test wrote."""
    return pickle.loads((weights / ".metadata").read_bytes())  # noqa: S301 -- the test wrote it


def edit_metadata(weights: Path, change: Callable[[Metadata], None]) -> None:
    """Writes `.metadata` again, the data as they are."""
    metadata = read_metadata(weights)
    change(metadata)
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


def place_of(weights: Path, key: str, chunk: int = 0) -> tuple[Path, int, int]:
    """File, first byte and number of bytes of a chunk."""
    metadata = read_metadata(weights)
    offsets = metadata.state_dict_metadata[key].chunks[chunk].offsets
    place = metadata.storage_data[MetadataIndex(key, offsets)]
    return weights / place.relative_path, place.offset, place.length


def flip(path: Path, at: int) -> None:
    """Turns one bit over, in place."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def numbers_of(weights: Path, key: str, chunk: int = 0) -> tuple[Path, int]:
    """File and first byte of the numbers of a chunk, past the head of its zip archive."""
    path, start, length = place_of(weights, key, chunk)
    content = path.read_bytes()[start : start + length]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        header = next(r.header_offset for r in archive.infolist() if r.filename.endswith("/data/0"))
    name, extra = (int.from_bytes(content[header + at : header + at + 2], "little") for at in (26, 28))
    return path, start + header + 30 + name + extra


def replace_saved(weights: Path, key: str, content: bytes) -> None:
    """Puts other bytes where the first chunk of an entry is saved."""
    (weights / "other.distcp").write_bytes(content)

    def change(metadata: Metadata) -> None:
        chunk = metadata.state_dict_metadata[key].chunks[0]
        place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        place.relative_path, place.offset, place.length = "other.distcp", 0, len(content)

    edit_metadata(weights, change)


class Touch:
    """Makes a file when it is unpickled, by a call of the shell or of eval."""

    def __init__(self, path: Path, by: Callable[[str], object]) -> None:
        self._path, self._by = path, by

    def __reduce__(self) -> tuple[object, tuple[str]]:
        if self._by is os.system:
            return os.system, (f"touch {self._path}",)
        return self._by, (f"open({str(self._path)!r}, 'w')",)


def saved(content: object) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def repacked(
    content: bytes, change: Mapping[str, Callable[[bytes], bytes]], compression: int = zipfile.ZIP_STORED
) -> bytes:
    """What torch.save wrote, with other records.

    Args:
        change: the end of a record's name -> what to make of it.
    """
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for record in old.namelist():
            edit = next((e for end, e in change.items() if record.endswith(end)), None)
            new.writestr(record, old.read(record) if edit is None else edit(old.read(record)))
    return stream.getvalue()
