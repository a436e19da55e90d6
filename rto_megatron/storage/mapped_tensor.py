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

_LITTLE = b"little"
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
        into = memoryview(target).cast("B")  # type: ignore[arg-type]  # numpy arrays are buffers; the stub says otherwise
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
    try:
        with zipfile.ZipFile(stream) as archive:
            records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
            numbers, order = records["data/0"], records.get("byteorder")
    except (zipfile.BadZipFile, KeyError) as error:
        raise RuntimeError(f"the archive of the tensor is damaged: {error}") from error
    # torch would turn the bytes round, of which there are none on the meta device: it ends the process.
    if order is not None and pages.find(_LITTLE, at := _begin(pages, start, order), at + len(_LITTLE)) < 0:
        raise RuntimeError("the numbers are in the byte order of another machine")
    stream.seek(0)
    saved = saved_tensor(stream)
    if saved.numel() == 0:
        return torch.empty(saved.shape, dtype=saved.dtype)
    begin, count = _begin(pages, start, numbers), numbers.file_size // saved.dtype.itemsize
    if numbers.compress_type != zipfile.ZIP_STORED or begin + numbers.file_size > start + length:
        raise RuntimeError("the numbers of the tensor are not stored whole")
    flat = torch.frombuffer(pages, dtype=saved.dtype, count=count, offset=begin)
    return flat.as_strided(saved.shape, saved.stride(), saved.storage_offset())


def _begin(pages: mmap.mmap, start: int, record: zipfile.ZipInfo) -> int:
    """Where the bytes of a record of an archive at `start` begin; zipfile would copy them and check their sum."""
    header = start + record.header_offset
    lengths = (
        int.from_bytes(pages[header + at : header + at + 2], "little") for at in (_NAME_LENGTH, _EXTRA_LENGTH)
    )
    return header + _LOCAL_HEADER + sum(lengths)
