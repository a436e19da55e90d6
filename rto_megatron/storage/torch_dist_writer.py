"""Writes a torch_dist checkpoint chunk by chunk, without a model and without holding the state in memory.

Files are those of torch.distributed.checkpoint 2.13, the entries those of megatron-core 0.19.2's dist_checkpointing.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from rto_megatron.storage.sliced_file import SlicedFile


class TorchDistWriter:
    """One checkpoint folder in the making; use `opened`.

    Example:
        writer = TorchDistWriter(folder, max_file_bytes=10**9)
        writer.tensor("norm", (64,), (0,), chunk)
    """

    def __init__(self, folder: Path, max_file_bytes: int) -> None:
        self._folder, self._max_file_bytes = folder, max_file_bytes
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._results: list[WriteResult] = []
        self._file: SlicedFile | None = None
        self._num_files = 0

    def tensor(self, key: str, size: tuple[int, ...], offsets: tuple[int, ...], chunk: Tensor) -> None:
        """Writes one chunk of an entry.

        Args:
            size: of the whole entry.
            offsets: of the chunk inside it.

        Raises:
            ValueError: an earlier chunk of the entry has another dtype.
        """
        entry = self._entries.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(size), [])
        )
        assert isinstance(entry, TensorStorageMetadata)
        if entry.properties.dtype != chunk.dtype:
            raise ValueError(
                f"{key} has a chunk of {chunk.dtype}, expected {entry.properties.dtype} as before"
            )
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), chunk.size()))
        if chunk.untyped_storage().nbytes() != chunk.nbytes:
            chunk = chunk.clone()  # torch.save writes the whole storage that a view is of
        self._append(MetadataIndex(key, torch.Size(offsets)), chunk, chunk.nbytes)

    def bytes_object(self, key: str, content: object) -> None:
        """Writes an entry that is not a tensor."""
        self._entries[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), content)

    def _append(self, index: MetadataIndex, content: object, nbytes: int = 0) -> None:
        file = self._file
        if file is None or (file.tell() and file.tell() + nbytes > self._max_file_bytes):
            self.close()
            self._num_files += 1
            file = self._file = SlicedFile(self._folder / f"__0_{self._num_files - 1}.distcp", "w")
        start = file.tell()
        torch.save(content, file)
        length = file.tell() - start
        self._results.append(
            WriteResult(index, length, _StorageInfo(Path(str(file.name)).name, start, length))
        )

    def close(self) -> None:
        """Puts the open file on the disk."""
        if self._file is not None:
            self._file.close_synced()
            self._file = None

    def finish(self, common: dict[str, object]) -> None:
        """Completes the checkpoint; metadata.json is the last file, by which readers know that it is whole.

        Args:
            common: what Megatron keeps beside tensors: `args`, `iteration`, `checkpoint_version`.
        """
        # Megatron-core up to 0.18 reads common.pt, 0.19 the entry; both hold the same.
        self.bytes_object("common_state/shard_0_1", [common])
        self.close()
        torch.save(common, self._folder / "common.pt")
        FileSystemWriter(self._folder).finish(Metadata(self._entries), [self._results])
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self._folder / "metadata.json").write_text(json.dumps(backends))


@contextmanager
def opened(folder: Path, max_file_bytes: int) -> Iterator[TorchDistWriter]:
    """A writer into an existing, empty folder; a file holds at most `max_file_bytes`, or one chunk."""
    writer = TorchDistWriter(folder, max_file_bytes)
    has_checksums = torch.serialization.get_crc32_options()
    # torch.load never reads the checksums, and making them is three quarters of the time of a save.
    torch.serialization.set_crc32_options(False)
    try:
        yield writer
    finally:
        writer.close()
        torch.serialization.set_crc32_options(has_checksums)
