"""A tensor that torch.save wrote, over the pages of its file: nothing is copied.

torch.save makes a zip archive whose records are stored as they are: `data.pkl` says what the tensor is, `data/0` holds
its numbers. Source: torch 2.13, serialization.py:_save.
"""

import io
import mmap
import zipfile

import torch
from torch import Tensor

from rto_megatron.platform.safe_metadata import saved_tensor

_LOCAL_HEADER, _NAME_LENGTH, _EXTRA_LENGTH = 30, 26, 28  # of the zip format


class _Slice(io.RawIOBase):
    """A part of a mapped file as a stream."""

    def __init__(self, pages: mmap.mmap, start: int, length: int) -> None:
        super().__init__()
        self._view, self._at = memoryview(pages)[start : start + length], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, len(self._view))[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: object) -> int:
        into = memoryview(target).cast("B")  # type: ignore[arg-type]
        part = self._view[self._at : self._at + len(into)]
        into[: len(part)] = part
        self._at += len(part)
        return len(part)


def mapped_tensor(pages: mmap.mmap, start: int, length: int) -> Tensor:
    """The tensor saved in bytes [start, start + length) of a file.

    Args:
        pages: the whole file, mapped privately.

    Raises:
        platform.safe_metadata.UNREADABLE: no saved tensor there, or one that does not lie as a plain array.
    """
    stream = io.BufferedReader(_Slice(pages, start, length))
    saved = saved_tensor(stream)
    if saved.numel() == 0:
        return torch.empty(saved.shape, dtype=saved.dtype)
    try:
        with zipfile.ZipFile(stream) as archive:
            record = next(r for r in archive.infolist() if r.filename.endswith("/data/0"))
    except (zipfile.BadZipFile, StopIteration) as error:
        raise RuntimeError(f"the archive of the tensor is damaged: {error}") from error
    header = start + record.header_offset
    lengths = (
        int.from_bytes(pages[header + at : header + at + 2], "little") for at in (_NAME_LENGTH, _EXTRA_LENGTH)
    )
    begin = header + _LOCAL_HEADER + sum(lengths)
    count = record.file_size // saved.dtype.itemsize
    if record.compress_type != zipfile.ZIP_STORED or begin + record.file_size > start + length:
        raise RuntimeError("the numbers of the tensor are not stored whole")
    numbers = torch.frombuffer(pages, dtype=saved.dtype, count=count, offset=begin)
    return numbers.as_strided(saved.shape, saved.stride(), saved.storage_offset())
