"""Reads parts of a torch_dist checkpoint without a model: checked against its files, unpickling nothing unknown."""

import io
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STATE_DICT_TYPE,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from rto_megatron.errors import UserError
from rto_megatron.platform import safe_metadata

_REMEDY = "the checkpoint is damaged or incomplete; take another copy or an older one"


class _Into(LoadPlanner):
    """Fills one tensor."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def set_up_planner(
        self, state_dict: STATE_DICT_TYPE, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        raise AssertionError("the plan is made by the reader")

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("the plan is made by the reader")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise AssertionError("the plan is made by the reader")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise AssertionError("the plan is made by the reader")

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("only tensors are read")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        return None


class TorchDistReader:
    """The tensors of one checkpoint folder by entry."""

    def __init__(self, folder: Path) -> None:
        """Reads `.metadata` and compares it with the files.

        Raises:
            UserError: not a torch_dist checkpoint, a missing or shortened file, an entry with a hole, or contents
                that may not be unpickled.
        """
        self.folder = folder
        _require_torch_dist(folder)
        safe_metadata.install()
        try:
            with (folder / ".metadata").open("rb") as stream:
                metadata = safe_metadata.read_metadata(stream)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        self.entries = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.objects = metadata.state_dict_metadata.keys() - self.entries.keys()
        self._check_files(metadata.storage_data)
        for key, entry in self.entries.items():
            self._check_chunks(key, entry, metadata.storage_data)
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def _check_files(self, places: dict[MetadataIndex, _StorageInfo]) -> None:
        sizes: dict[str, int] = {}
        for index, place in places.items():
            name = place.relative_path
            path = self.folder / name
            if name not in sizes:
                if Path(name).name != name or path.is_symlink():
                    raise UserError(
                        f"{self.folder}/.metadata names {name}, which is not a plain file of the folder"
                    )
                if not path.is_file():
                    raise UserError(f"{path} is missing, it holds {index.fqn}; {_REMEDY}")
                sizes[name] = path.stat().st_size
            if place.offset < 0 or place.length < 0 or place.offset + place.length > sizes[name]:
                raise UserError(
                    f"{path} has {sizes[name]} bytes, and {index.fqn} should end at byte "
                    f"{place.offset + place.length}; {_REMEDY}"
                )

    def _check_chunks(
        self, key: str, entry: TensorStorageMetadata, places: dict[MetadataIndex, _StorageInfo]
    ) -> None:
        volume = 0
        for chunk in entry.chunks:
            place = places.get(MetadataIndex(key, chunk.offsets))
            nbytes = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            fits = all(
                start >= 0 and start + size <= whole
                for start, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            )
            if place is None or place.length < nbytes or not fits:
                raise UserError(
                    f"{self.folder}: the chunk of {key} at {tuple(chunk.offsets)} is not stored whole; {_REMEDY}"
                )
            volume += math.prod(chunk.sizes)
        if volume != math.prod(entry.size):
            raise UserError(
                f"{self.folder}: {key} has shape {tuple(entry.size)}, {math.prod(entry.size)} numbers, and "
                f"{volume} are stored; {_REMEDY}"
            )

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole entry."""
        return tuple(self.entries[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Of an entry."""
        return self.entries[key].properties.dtype

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Copies a box out of an entry, whatever chunks it was written in.

        Raises:
            UserError: a chunk's bytes are not the tensor that the metadata announce.
        """
        entry = self.entries[key]
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [box])
        try:
            self._reader.read_data(LoadPlan(items), _Into(target))
        except safe_metadata.UNREADABLE as error:
            raise UserError(f"{self.folder}: {key} cannot be read ({error}); {_REMEDY}") from error
        return target


def _require_torch_dist(folder: Path) -> None:
    path = folder / "metadata.json"
    if path.is_file():
        try:
            backend = json.loads(path.read_text()).get("sharded_backend")
        except (json.JSONDecodeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); {_REMEDY}") from error
        if backend != "torch_dist":
            raise UserError(f"{path}: the format is {backend!r}; expected torch_dist")
    elif any(folder.glob("mp_rank_*")):
        raise UserError(
            f"{folder} is in Megatron-LM's legacy format, whose files are pickles and never read here; load it in "
            "Megatron-LM and save it with --ckpt-format torch_dist"
        )
    if not path.is_file() or not (folder / ".metadata").is_file():
        raise UserError(
            f"{folder} has no metadata.json and .metadata: not a torch_dist checkpoint, or one whose save did not end"
        )
