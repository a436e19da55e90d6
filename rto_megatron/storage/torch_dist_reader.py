"""Reads parts of a torch_dist checkpoint without a model: checked against its files, unpickling nothing unknown."""

import json
import math
import mmap
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from rto_megatron.errors import ModelFolderError, UserError
from rto_megatron.platform import safe_metadata
from rto_megatron.storage.mapped_tensor import mapped_tensor

_REMEDY = "the checkpoint is damaged or incomplete; take another copy or an older one"


class TorchDistReader:
    """The tensors of one checkpoint folder by entry.

    Example:
        TorchDistReader(folder).shape("embedding.word_embeddings.weight")
    """

    def __init__(self, folder: Path) -> None:
        """Reads `.metadata` and compares it with the files.

        Raises:
            ModelFolderError: not a torch_dist checkpoint, a missing or shortened file, an entry with a hole, or
                contents that may not be unpickled.
        """
        self.folder = folder
        _require_torch_dist(folder)
        safe_metadata.install()
        try:
            with (folder / ".metadata").open("rb") as stream:
                metadata = safe_metadata.read_metadata(stream)
        except UserError as error:
            raise error.about(str(folder)) from error
        try:
            self._adopt(metadata)
        except UserError:
            raise
        except (AttributeError, TypeError, ValueError, LookupError) as error:
            raise ModelFolderError(f"{folder}/.metadata is damaged ({error}); {_REMEDY}") from error
        self._mapped: dict[str, mmap.mmap] = {}
        self._by_layer: dict[str, dict[int | None, list[ChunkStorageMetadata]]] = {}

    def _adopt(self, metadata: Metadata) -> None:
        self.entries = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._check_files(metadata.storage_data)
        for key, entry in self.entries.items():
            self._check_chunks(key, entry, metadata.storage_data)
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data

    def _check_files(self, places: dict[MetadataIndex, _StorageInfo]) -> None:
        sizes: dict[str, int] = {}
        for index, place in places.items():
            name = place.relative_path
            path = self.folder / name
            if name not in sizes:
                if Path(name).name != name or path.is_symlink():
                    raise ModelFolderError(
                        f"{self.folder}/.metadata names {name}, which is not a plain file of the folder"
                    )
                if not path.is_file():
                    raise ModelFolderError(f"{path} is missing, it holds {index.fqn}; {_REMEDY}")
                sizes[name] = path.stat().st_size
            if place.offset < 0 or place.length < 0 or place.offset + place.length > sizes[name]:
                raise ModelFolderError(
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
            fits = len(chunk.offsets) == len(chunk.sizes) == len(entry.size) and all(
                start >= 0 and start + size <= whole
                for start, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            )
            if place is None or place.length < nbytes or not fits:
                raise ModelFolderError(
                    f"{self.folder}: the chunk of {key} at {tuple(chunk.offsets)} is not stored whole; {_REMEDY}"
                )
            volume += math.prod(chunk.sizes)
        if volume != math.prod(entry.size):
            raise ModelFolderError(
                f"{self.folder}: {key} has shape {tuple(entry.size)}, {math.prod(entry.size)} numbers, and "
                f"{volume} are stored; {_REMEDY}"
            )

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the whole entry."""
        return tuple(self.entries[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of an entry."""
        return self.entries[key].properties.dtype

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """A box out of an entry, whatever chunks it was written in; a single chunk is mapped, several are copied.

        Raises:
            ModelFolderError: chunks overlap, or a chunk's bytes are not the tensor that the metadata announce.
        """
        entry = self.entries[key]
        pieces = [
            (chunk, overlap)
            for chunk in self._candidates(key, offsets, sizes)
            if (overlap := _overlap(chunk, offsets, sizes)) is not None
        ]
        if not _fill([overlap for _, overlap in pieces], sizes):
            raise ModelFolderError(
                f"{self.folder}: the part {sizes} of {key} at {offsets} is recorded twice or has holes; {_REMEDY}"
            )
        if len(pieces) == 1:
            chunk, overlap = pieces[0]
            return _narrowed(self._chunk(key, chunk), chunk.offsets, overlap)
        box = torch.empty(sizes, dtype=entry.properties.dtype)
        for chunk, overlap in pieces:
            _narrowed(box, offsets, overlap).copy_(_narrowed(self._chunk(key, chunk), chunk.offsets, overlap))
        return box

    def _candidates(
        self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> list[ChunkStorageMetadata]:
        """Chunks that may overlap a box; found by layer where layers are stacked, for there are thousands."""
        if key not in self._by_layer:
            chunks = self.entries[key].chunks
            is_stacked = all(len(c.sizes) > 2 and c.sizes[0] == 1 for c in chunks)
            layers: dict[int | None, list[ChunkStorageMetadata]] = {}
            for chunk in chunks:
                layers.setdefault(chunk.offsets[0] if is_stacked else None, []).append(chunk)
            self._by_layer[key] = layers
        layers = self._by_layer[key]
        if None in layers:
            return layers[None]
        return [c for layer in range(offsets[0], offsets[0] + sizes[0]) for c in layers.get(layer, [])]

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._places[MetadataIndex(key, chunk.offsets)]
        pages = self._file(place.relative_path)
        try:
            tensor = mapped_tensor(pages, place.offset, place.length)
        except safe_metadata.UNREADABLE as error:
            raise ModelFolderError(
                f"{self.folder}: {key} cannot be read ({safe_metadata.reason(error)}); {_REMEDY}"
            ) from error
        if tensor.shape != chunk.sizes or tensor.dtype != self.dtype(key):
            raise ModelFolderError(
                f"{self.folder}: the chunk of {key} at {tuple(chunk.offsets)} is {tensor.dtype} "
                f"{tuple(tensor.shape)}, .metadata says {self.dtype(key)} {tuple(chunk.sizes)}; {_REMEDY}"
            )
        return tensor

    def _file(self, name: str) -> mmap.mmap:
        if name not in self._mapped:
            with (self.folder / name).open("rb") as file:
                # A private mapping is writable, which torch wants of memory, and never reaches the file.
                self._mapped[name] = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
        return self._mapped[name]


type _Box = list[tuple[int, int]]  # (start, length) in every dimension


def _overlap(chunk: ChunkStorageMetadata, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> _Box | None:
    box = []
    for start, length, first, count in zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True):
        low, high = max(start, first), min(start + length, first + count)
        if low >= high:
            return None
        box.append((low, high - low))
    return box


def _fill(boxes: Sequence[_Box], sizes: tuple[int, ...]) -> bool:
    """Whether boxes fill a box of these sizes, each number once."""
    volume = sum(math.prod(length for _, length in box) for box in boxes)
    return volume == math.prod(sizes) and not any(_meet(*pair) for pair in combinations(boxes, 2))


def _meet(one: _Box, other: _Box) -> bool:
    return all(a < b + m and b < a + n for (a, n), (b, m) in zip(one, other, strict=True))


def _narrowed(tensor: Tensor, offsets: Sequence[int], box: _Box) -> Tensor:
    """The part of a tensor that begins at `offsets` which lies in `box`."""
    for dim, (start, length) in enumerate(box):
        tensor = tensor.narrow(dim, start - offsets[dim], length)
    return tensor


def _require_torch_dist(folder: Path) -> None:
    path = folder / "metadata.json"
    if path.is_file():
        try:
            backend = json.loads(path.read_text()).get("sharded_backend")
        except (ValueError, AttributeError) as error:
            raise ModelFolderError(f"{path} is damaged ({error}); {_REMEDY}") from error
        if backend != "torch_dist":
            raise ModelFolderError(f"{path}: the format is {backend!r}; expected torch_dist")
    elif any(folder.glob("mp_rank_*")):
        raise ModelFolderError(
            f"{folder} is in Megatron-LM's legacy format, whose files are pickles and never read here; load it in "
            "Megatron-LM and save it with --ckpt-format torch_dist"
        )
    if not path.is_file() or not (folder / ".metadata").is_file():
        raise ModelFolderError(
            f"{folder} has no metadata.json and .metadata: not a torch_dist checkpoint, or one whose save did not end"
        )
