"""Writes safetensors shards tensor by tensor: headers are known before, so that no shard is held in memory.

The file format is that of github.com/huggingface/safetensors: eight bytes of header length, a JSON header, data.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rto_megatron.storage.hf_folder import DTYPES
from rto_megatron.storage.sliced_file import SlicedFile
from rto_megatron.storage.weight_files import INDEX, SINGLE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass
class _Shard:
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    nbytes: int = 0
    starts: dict[str, int] = field(default_factory=dict)  # from the beginning of the file
    file: SlicedFile | None = None
    num_left: int = 0


class HfWriter:
    """A set of shards whose tensors arrive in any order, each once.

    Example:
        writer = HfWriter(folder, specs, max_shard_bytes=5 * 10**9)
        writer.write("lm_head.weight", tensor)
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], max_shard_bytes: int
    ) -> None:
        """Plans the shards.

        Args:
            specs: name -> (dtype, shape), in the order in which they will come.
            max_shard_bytes: a shard holds at most this many bytes, or one tensor.
        """
        self._folder = folder
        shards = [_Shard()]
        for name, (dtype, shape) in specs.items():
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            if shards[-1].specs and shards[-1].nbytes + nbytes > max_shard_bytes:
                shards.append(_Shard())
            shards[-1].specs[name] = (dtype, shape)
            shards[-1].nbytes += nbytes
        count = len(shards)
        self._shards = {
            SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors": shard
            for number, shard in enumerate(shards, 1)
        }
        self._file_of = {name: file for file, shard in self._shards.items() for name in shard.specs}

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor at its place; a shard is on the disk once its last tensor is.

        Raises:
            ValueError: it is not what its spec announced.
        """
        shard = self._shards[self._file_of[name]]
        if shard.file is None:
            shard.file = self._start(self._file_of[name], shard)
        found, expected = (tensor.dtype, tuple(tensor.shape)), shard.specs[name]
        if found != expected:
            raise ValueError(f"{name} came as {found[0]} {found[1]}, expected {expected[0]} {expected[1]}")
        shard.file.seek(shard.starts[name])
        shard.file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        shard.num_left -= 1
        if shard.num_left == 0:
            shard.file.close_synced()

    def _start(self, file: str, shard: _Shard) -> SlicedFile:
        # Wider types first keeps every tensor aligned to its own width, which mapping one demands.
        ordered = sorted(shard.specs, key=lambda name: -shard.specs[name][0].itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in ordered:
            dtype, shape = shard.specs[name]
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
            shard.starts[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        shard.starts = {name: 8 + len(text) + start for name, start in shard.starts.items()}
        shard.num_left = len(ordered)
        opened = SlicedFile(self._folder / file, "w")
        opened.write(len(text).to_bytes(8, "little") + text)
        return opened

    def finish(self) -> None:
        """Writes the index where there are several shards.

        Raises:
            ValueError: a tensor that was announced has not come.
        """
        left = {
            n: shard.num_left for n, shard in self._shards.items() if shard.file is None or shard.num_left
        }
        if left:
            raise ValueError(f"of these files tensors are missing, so the folder is not whole: {left}")
        if len(self._shards) == 1:
            return
        total = sum(shard.nbytes for shard in self._shards.values())
        index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
        (self._folder / INDEX).write_text(json.dumps(index, indent=1))
